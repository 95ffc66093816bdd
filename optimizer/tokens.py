"""Text as windows of tokens, which is how passes and evaluation take it."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SAMPLED", "Tokens"]

SAMPLED = "sampled"
"""The name of text that was sampled from the source model."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Windows of one text.

    Attention is causal, so what stands behind a text changes nothing before it; but positions behind a text are no
    text: leave them out of every statistic, by ``mask``.

    Attributes:
        name: The file as the user named it, or ``SAMPLED``.
        ids: int64 ``[windows, tokens]``.
        digest: sha256 of the file's contents, or of the ids when there is no file; hexadecimal.
        lengths: int64 ``[windows]``, tokens of text in each window, the rest on its right being padding; None where
            every window is full.
    """

    name: str
    ids: Tensor
    digest: str
    lengths: Tensor | None = None

    @property
    def is_sampled(self) -> bool:
        """Whether the source model wrote this text itself."""
        return self.name == SAMPLED

    @property
    def mask(self) -> Tensor:
        """Bool ``[windows, tokens]``, true where there is text."""
        if self.lengths is None:
            return torch.ones_like(self.ids, dtype=torch.bool)
        return torch.arange(self.ids.shape[1]) < self.lengths[:, None]

    @property
    def count(self) -> int:
        """Tokens of text in all windows."""
        return self.ids.numel() if self.lengths is None else int(self.lengths.sum())
