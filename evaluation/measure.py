"""What a build lost: its engine against the source model on the same tokens, in one pass over both."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from llmopt.calibration.reference import Reference
from llmopt.evaluation.distance import Distance
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.manifest import Engine, Measurement
from llmopt.optimizer.model import Model
from llmopt.optimizer.tokens import Tokens
from llmopt.runtime.backends.base import Backend

__all__ = ["compare", "compare_states", "measure", "measure_model"]

_ROWS = 128
"""Positions whose logits are in memory at a time: with a vocabulary of 150,000, 77 MB a side."""


def measure(
    model: Model,
    open_engine: Callable[[], Backend],
    texts: Sequence[Tokens],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Measurement]:
    """KL divergence, top-1 agreement and, on text that the source did not write itself, perplexity.

    Args:
        model: The source model; run in float32, one layer in memory at a time.
        open_engine: Opens the build's engine, of which slot 0 is used. Called when the source has left its layers: the
            engine and a layer of a large model together are more than either.
        texts: What to measure on.
        threads: PyTorch threads; None keeps the process's number.
        progress: Called with (finished, total) units of about equal time.

    Returns:
        For each text in order: ``kl`` in nats per token, ``top1`` as a share, ``perplexity``.

    Raises:
        InputError: The windows are longer than the backend's slots, or no text is given.
    """
    if not texts:
        raise InputError("there is nothing to measure on: no text is given")
    # A layer of the source and a window of the engine and both heads are about equal work.
    total = sum(model.num_layers + len(text.ids) for text in texts)
    steps = iter(range(1, total + 1))

    def step(*_: int) -> None:
        progress(next(steps), total)

    reference = Reference(model, threads=threads)
    states = [reference.hidden_states(text.ids, progress=step) for text in texts]
    backend = open_engine()
    found: list[Measurement] = []
    for text, hidden in zip(texts, states, strict=True):
        found += _as_measurements(text, compare(reference, hidden, backend, text.ids, progress=step))
    return found


def measure_model(
    source: Model,
    model: Model,
    texts: Sequence[Tokens],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Measurement]:
    """The same of a model that no engine was made of: both are run in float32, one layer in memory at a time.

    Args:
        source: The source model.
        model: What became of it.
        texts: What to measure on.
        threads: PyTorch threads; None keeps the process's number.
        progress: Called with (finished, total) layers.

    Returns:
        As ``measure``.
    """
    total = 2 * len(texts) * model.num_layers
    steps = iter(range(1, total + 1))

    def step(*_: int) -> None:
        progress(next(steps), total)

    before, behind = (Reference(each, threads=threads) for each in (source, model))
    found: list[Measurement] = []
    for text in texts:
        expected, states = (each.hidden_states(text.ids, progress=step) for each in (before, behind))
        found += _as_measurements(text, compare_states(before, expected, behind, states, text.ids))
    return found


def compare_states(source: Reference, expected: Tensor, reference: Reference, found: Tensor, ids: Tensor) -> Distance:
    """Sum what lies between the predictions of two models, from what leaves their last layers.

    Args:
        source: The source model.
        expected: Of it, float32 ``[n, t, d]``.
        reference: The other model.
        found: Of it, the same shape.
        ids: The windows, int64 ``[n, t]``.
    """
    distance = Distance()
    for window, ours, theirs in zip(ids, expected, found, strict=True):
        for first in range(0, len(window), _ROWS):
            rows = slice(first, first + _ROWS)
            distance.add(source.head(ours[rows]), reference.head(theirs[rows]), window[first + 1 : first + _ROWS + 1])
    return distance


def compare(
    reference: Reference,
    hidden: Tensor,
    backend: Backend,
    ids: Tensor,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Distance:
    """Run the engine on windows int64 ``[n, t]``, each from its own beginning, and sum what lies between both models.

    Args:
        reference: The source model.
        hidden: What leaves its last layer, float32 ``[n, t, d]``.
        backend: The engine.
        ids: The windows.
        progress: Called with (finished, total) windows.

    Raises:
        InputError: The windows are longer than the backend's slots.
    """
    windows, tokens = ids.shape
    if tokens > backend.capacity:
        raise InputError(
            f"windows have {tokens} tokens, the engine takes at most {backend.capacity}", hint="take shorter windows"
        )
    distance = Distance()
    for number in range(windows):
        for first, past_end in _chunks(tokens, backend.engine):
            source = reference.head(hidden[number, first:past_end])
            piece = ids[number, first:past_end].numpy()
            logits = backend.prefill(0, piece, first, np.arange(len(piece)))
            distance.add(source, torch.from_numpy(logits), ids[number, first + 1 : past_end + 1])
        backend.drop(0)
        progress(number + 1, windows)
    return distance


def _chunks(tokens: int, engine: Engine) -> Iterator[tuple[int, int]]:
    """(first, past the end) of pieces of nearly equal length: none has one token unless the text has."""
    count = -(-tokens // min(_ROWS, engine.max_chunk))
    ends = [tokens * number // count for number in range(count + 1)]
    return pairwise(ends)


def _as_measurements(text: Tokens, distance: Distance) -> Iterator[Measurement]:
    common = {"data": text.name, "data_digest": text.digest}
    yield Measurement(metric="kl", value=distance.mean_kl, tokens=distance.positions, **common)
    yield Measurement(metric="top1", value=distance.top1, tokens=distance.positions, **common)
    if not text.is_sampled:
        engine, source = distance.perplexities
        yield Measurement(metric="perplexity", value=engine, source=source, tokens=distance.targets, **common)
