"""Calibration text on its way through a decoder: one layer's weights in memory, and what enters it for every token."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Self

import torch
from torch import Tensor

from llmopt.calibration.observe import Observer, observing
from llmopt.calibration.reference import Reference, fast_dtype
from llmopt.optimizer.contracts import ACTIVATION_BYTES, PassContext
from llmopt.optimizer.model import Model, Weight
from llmopt.optimizer.tokens import Tokens

__all__ = ["Layerwise", "observe_both", "through_layers"]

_BATCH_TOKENS = 2048


class Layerwise:
    """Many windows of text in front of one decoder layer.

    The windows are observed as often as wanted, weights of the layer may be replaced between, and ``advance`` takes all
    windows through it, to the next layer.

    Args:
        model: What runs. Weights that ``update`` is given replace its own.
        tokens: The windows.
        threads: PyTorch threads; None keeps the process's number.
        dtype: What is computed in, but for statistics. None: bfloat16 where the CPU multiplies it faster, else float32.
        directory: Where what enters a layer lies if it exceeds ``in_memory``.
        in_memory: Bytes.
    """

    def __init__(
        self,
        model: Model,
        tokens: Tokens,
        *,
        threads: int | None = None,
        dtype: torch.dtype | None = None,
        directory: Path,
        in_memory: int = ACTIVATION_BYTES,
    ) -> None:
        self.reference = Reference(model, threads=threads, dtype=dtype or fast_dtype())
        self.index = 0
        per_batch = max(1, _BATCH_TOKENS // tokens.ids.shape[1])
        self._batches = [slice(n, n + per_batch) for n in range(0, len(tokens.ids), per_batch)]
        self._through: set[int] = set()
        self._mask = None if tokens.lengths is None else tokens.mask
        shape = (*tokens.ids.shape, model.decoder.hidden_size)
        self._hidden = _room(shape, self.reference.dtype, directory, in_memory=in_memory)
        for batch in self._batches:
            self._hidden[batch] = self.reference.embed(tokens.ids[batch])

    @classmethod
    def of(cls, model: Model, context: PassContext) -> Self:
        """In front of a pass's model, its calibration text."""
        return cls(
            model,
            context.calibration(),
            threads=context.threads,
            directory=context.work or Path(),
            in_memory=context.activation_bytes,
        )

    @property
    def batches(self) -> int:
        """In how many calls the windows pass a layer."""
        return len(self._batches)

    def observe(self, modules: Iterable[str], observer: Observer) -> None:
        """Run every window until all of ``modules``, linears of this layer, have been reached, and show what enters.

        Args:
            modules: Their names.
            observer: Called for each batch and module; see ``Observer``. Padding is left out.
        """
        modules = tuple(modules)
        for number in range(self.batches):
            self.observe_batch(number, modules, observer)

    def observe_batch(self, number: int, modules: Iterable[str], observer: Observer, *, leaves: bool = False) -> None:
        """``observe`` for one batch of windows, which with ``leaves`` has then left the layer."""
        batch, waiting = self._batches[number], set(modules)
        mask = None if self._mask is None else self._mask[batch]

        def show(module: str, rows: Tensor) -> None:
            observer(module, rows.to(torch.float32))
            waiting.remove(module)
            if not waiting and not leaves:
                raise _AllSeen

        with observing(self.reference, waiting.copy(), show, mask=mask), suppress(_AllSeen):
            # Where no norm stands before a linear, an observer is shown this very memory, and may keep it.
            left = self.reference.layer(self.index, self._hidden[batch].clone() if leaves else self._hidden[batch])
            if leaves:
                self._hidden[batch] = left
                self._through.add(number)
        assert not waiting, f"layer {self.index} has no linear {min(waiting)}"

    def update(self, weights: Mapping[str, Weight]) -> None:
        """Go on with other weights of this layer."""
        self.reference.update(weights)

    def advance(self) -> None:
        """Take every window that has not left it through this layer, and go on to the next."""
        for number, batch in enumerate(self._batches):
            if number not in self._through:
                self._hidden[batch] = self.reference.layer(self.index, self._hidden[batch])
        self._through.clear()
        self.index += 1


class _AllSeen(Exception):  # noqa: N818 - not an error: it ends a layer's run early
    """Every module that was asked for has been observed."""


def observe_both(
    working: Layerwise,
    exact: Layerwise,
    modules: Iterable[str],
    observer: Callable[[str, Tensor, Tensor], None],
    *,
    exact_leaves: bool = False,
) -> None:
    """Show what enters ``modules`` in two runs of the same windows, row by row.

    Args:
        working: One run, such as that of a model whose former layers are quantized.
        exact: The other, in front of the same layer.
        modules: Linears of this layer, none of them an expert: the runs may route a token to different experts.
        observer: Called with a module, its rows in ``working`` and those in ``exact``, float32 ``[rows, in]``.
        exact_leaves: Whether ``exact`` is through the layer afterwards, which saves running it again.
    """
    modules = tuple(modules)
    for number in range(working.batches):
        rows: dict[str, Tensor] = {}
        exact.observe_batch(number, modules, rows.__setitem__, leaves=exact_leaves)

        def show(module: str, found: Tensor, rows: Mapping[str, Tensor] = rows) -> None:
            observer(module, found, rows[module])

        working.observe_batch(number, modules, show)


def through_layers(
    reference: Reference,
    context: PassContext,
    *,
    watching: Callable[[Tensor], AbstractContextManager[None]],
    progress: Callable[[int, int], None],
) -> list[tuple[Tensor, Tensor]]:
    """Take a pass's calibration text through all layers, one in memory at a time.

    Args:
        reference: The model.
        context: Of the pass.
        watching: Called with the mask of a batch, bool ``[n, t]``, and entered while it goes through a layer.
        progress: Called with (finished, total) layers.

    Returns:
        For each batch what leaves the last layer, ``[n, t, d]`` in the reference's dtype, and its mask.
    """
    tokens, decoder = context.calibration(), reference.model.decoder
    step = max(1, _BATCH_TOKENS // tokens.ids.shape[1])
    hidden = _room(
        (*tokens.ids.shape, decoder.hidden_size),
        reference.dtype,
        context.work or Path(),
        in_memory=context.activation_bytes,
    )
    batches = list(zip(torch.split(hidden, step), torch.split(tokens.mask, step), strict=True))
    for (batch, _), ids in zip(batches, torch.split(tokens.ids, step), strict=True):
        batch.copy_(reference.embed(ids))
    for index in range(len(decoder.layers)):
        for batch, mask in batches:
            with watching(mask):
                batch.copy_(reference.layer(index, batch))
        progress(index + 1, len(decoder.layers))
    return batches


def _room(shape: tuple[int, ...], dtype: torch.dtype, directory: Path, *, in_memory: int) -> Tensor:
    """A tensor of any values: up to ``in_memory`` bytes in memory, else mapped from a file that disappears with it."""
    size = torch.Size(shape).numel()
    if size * dtype.itemsize <= in_memory:
        return torch.empty(shape, dtype=dtype)
    directory.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=directory) as file:
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).reshape(shape)
