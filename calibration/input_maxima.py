"""The largest magnitude that enters each linear while a model reads a text: the range of static activation scales."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.calibration.layerwise import through_layers
from llmopt.calibration.reference import Reference
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import Model
from llmopt.optimizer.parameters import their_name

__all__ = ["input_maxima"]


def input_maxima(
    model: Model,
    modules: Iterable[str],
    context: PassContext,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """``max|x|`` over all tokens of text and all columns, of each of ``modules``; one layer is in memory at a time.

    Args:
        model: What reads the text.
        modules: Names of linears.
        context: Of the pass that asks: its calibration text, padding left out, its threads, and where activations lie.
        progress: Called with (finished, total) layers.

    Raises:
        PassError: What enters a linear is not finite.
    """
    reference = Reference(model, threads=context.threads)
    found = _Maxima(reference, list(modules))
    batches = through_layers(reference, context, watching=found.watching, progress=progress)
    if model.decoder.head in found.largest:
        for batch, mask in batches:
            for rows in torch.split(batch[mask], 256):
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
