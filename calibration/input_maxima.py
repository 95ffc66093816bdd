"""The largest magnitude that enters each linear while a model reads a text: the range of static activation scales."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.calibration.layerwise import room
from llmopt.calibration.reference import Reference
from llmopt.optimizer.contracts import ACTIVATION_BYTES
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import Model
from llmopt.optimizer.parameters import their_name
from llmopt.optimizer.tokens import Tokens

__all__ = ["input_maxima"]

_BATCH_TOKENS = 2048


def input_maxima(
    model: Model,
    tokens: Tokens,
    modules: Iterable[str],
    *,
    threads: int | None = None,
    directory: Path = Path(),
    in_memory: int = ACTIVATION_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """``max|x|`` over all tokens of text and all columns, of each of ``modules``; one layer is in memory at a time.

    Args:
        model: What reads the text.
        tokens: The text; padding is left out.
        modules: Names of linears.
        threads: PyTorch threads while it runs; None keeps the process's number.
        directory: Where activations lie if they exceed ``in_memory``.
        in_memory: Bytes.
        progress: Called with (finished, total) layers.

    Raises:
        PassError: What enters a linear is not finite.
    """
    reference = Reference(model, threads=threads)
    found = _Maxima(reference, list(modules))
    step = max(1, _BATCH_TOKENS // tokens.ids.shape[1])
    masks = torch.split(tokens.mask, step)
    shape = (*tokens.ids.shape, model.decoder.hidden_size)
    pieces = torch.split(room(shape, reference.dtype, directory, in_memory=in_memory), step)
    for piece, ids in zip(pieces, torch.split(tokens.ids, step), strict=True):
        piece.copy_(reference.embed(ids))
    for index in range(model.num_layers):
        for piece, mask in zip(pieces, masks, strict=True):
            with found.watching(mask):
                piece.copy_(reference.layer(index, piece))
        progress(index + 1, model.num_layers)
    if model.decoder.head in found.largest:
        for piece, mask in zip(pieces, masks, strict=True):
            for rows in torch.split(piece[mask], 256):
                with found.watching(torch.ones(len(rows), 1, dtype=torch.bool)):
                    reference.head(rows)
    return found.largest


class _Maxima:
    """Hooks on linears that remember the largest magnitude of their inputs."""

    def __init__(self, reference: Reference, names: list[str]) -> None:
        self.largest = dict.fromkeys(names, 0.0)
        arch = reference.model.arch
        self._modules = {name: reference.network.get_submodule(their_name(arch, name)) for name in names}

    @contextmanager
    def watching(self, mask: Tensor) -> Iterator[None]:
        """Look at the tokens ``mask``, bool ``[n, t]``, says."""
        hooks = [
            module.register_forward_pre_hook(partial(self._look, name, mask)) for name, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _look(self, name: str, mask: Tensor, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        x: Tensor = inputs[0]
        largest = float(x.reshape(*mask.shape, -1)[mask].abs().max()) if mask.any() else 0.0
        if not largest < float("inf"):
            raise PassError(
                f"what enters {name} is not finite",
                hint="a weight before it is too large, or the checkpoint is damaged",
            )
        self.largest[name] = max(self.largest[name], largest)
