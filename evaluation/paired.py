"""Token by token: how far the predictions of several executions are from the source model's, on the same tokens.

Two exact executions of one W8A8 model differ, since an activation on the border of two integers may round either way
and everything behind it follows. Whether a change of the mean is more than that is told by its standard error, which
needs the tokens' own values and not only their sum.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.calibration.divergence import kl_divergence
from llmopt.calibration.reference import Reference
from llmopt.optimizer.model import Model

__all__ = ["Agreement", "Yardstick", "model_logits"]

_ROWS = 128
"""Positions whose logits are compared at a time: with a vocabulary of 150,000, 77 MB a side."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """One execution against the source model.

    Attributes:
        kl: KL(source || execution) in nats, float64 ``[windows, tokens]``.
        same: Whether both have the same most likely next token, bool ``[windows, tokens]``.
    """

    kl: Tensor
    same: Tensor

    @staticmethod
    def perfect(shape: torch.Size) -> "Agreement":
        """The source model's own, for ``[windows, tokens]``."""
        return Agreement(torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.bool))

    @property
    def mean_kl(self) -> float:
        """Nats per token. Rounding may leave that of two equal models a little below 0; this is 0 then."""
        return max(0.0, float(self.kl.mean()))

    @property
    def top1(self) -> float:
        """Share of tokens with the same most likely successor."""
        return float(self.same.double().mean())

    def change_from(self, before: "Agreement") -> tuple[float, float | None]:
        """By how much the mean KL grew, and the standard error of that; None where one window gives no scatter.

        Windows are what varies independently: a token that is disturbed disturbs the rest of its window. So the error
        is the standard deviation over windows of the difference of their means, divided by the root of their number.
        """
        difference = (self.kl - before.kl).mean(1)
        count = len(difference)
        error = float(difference.std()) / math.sqrt(count) if count > 1 else None
        return float(difference.mean()), error


class Yardstick:
    """The source model on some windows, which it has read once."""

    def __init__(self, model: Model, ids: Tensor, *, threads: int | None = None) -> None:
        """``ids``: int64 ``[windows, tokens]``; ``threads``: PyTorch's, None keeps the process's number."""
        self.ids = ids
        self._reference = Reference(model, threads=threads)
        self._hidden = self._reference.hidden_states(ids)

    def compare(self, logits: Iterable[Tensor]) -> Agreement:
        """Hold an execution against the source.

        Args:
            logits: Of consecutive blocks of windows, float32 ``[some windows, tokens, vocabulary]``, in order.
        """
        kl = torch.empty(self.ids.shape, dtype=torch.float64)
        same = torch.empty(self.ids.shape, dtype=torch.bool)
        window = 0
        for block in logits:
            for found in block:
                for first in range(0, len(found), _ROWS):
                    rows = slice(first, first + _ROWS)
                    source = self._reference.head(self._hidden[window, rows])
                    kl[window, rows] = kl_divergence(source, found[rows])
                    same[window, rows] = source.argmax(-1) == found[rows].argmax(-1)
                window += 1
        assert window == len(self.ids), "logits of every window"
        return Agreement(kl, same)


def model_logits(model: Model, ids: Tensor, *, threads: int | None = None) -> Iterator[Tensor]:
    """What ``model`` predicts, computed by the reference: a window at a time, float32 ``[1, tokens, vocabulary]``."""
    reference = Reference(model, threads=threads)
    for hidden in reference.hidden_states(ids):
        yield reference.head(hidden)[None]
