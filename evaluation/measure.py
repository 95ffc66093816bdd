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

__all__ = ["compare", "measure"]

_ROWS = 128
"""Positions whose logits are in memory at a time: with a vocabulary of 150,000, 77 MB a side."""


def measure(
    model: Model,
    backend: Backend,
    texts: Sequence[Tokens],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Measurement]:
    """KL divergence, top-1 agreement and, on text that the source did not write itself, perplexity.

    Args:
        model: The source model; run in float32, one layer in memory at a time.
        backend: The build's engine; slot 0 is used.
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
    found: list[Measurement] = []
    for number, text in enumerate(texts):

        def tick(done: int, total: int, number: int = number) -> None:
            progress(number * total + done, len(texts) * total)

        found += _as_measurements(text, compare(model, backend, text.ids, threads=threads, progress=tick))
    return found


def compare(
    model: Model,
    backend: Backend,
    ids: Tensor,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Distance:
    """Run both on windows int64 ``[n, t]``, each from its own beginning, and sum what lies between them.

    Raises:
        InputError: The windows are longer than the backend's slots.
    """
    windows, tokens = ids.shape
    if tokens > backend.capacity:
        raise InputError(
            f"windows have {tokens} tokens, the engine takes at most {backend.capacity}", hint="take shorter windows"
        )
    reference = Reference(model, threads=threads)
    # A layer of the source and a window of the engine and both heads are about equal work.
    total = model.num_layers + windows
    hidden = reference.hidden_states(ids, progress=lambda done, _: progress(done, total))
    distance = Distance()
    for number in range(windows):
        for first, past_end in _chunks(tokens, backend.engine):
            source = reference.head(hidden[number, first:past_end])
            piece = ids[number, first:past_end].numpy()
            logits = backend.prefill(0, piece, first, np.arange(len(piece)))
            distance.add(source, torch.from_numpy(logits), ids[number, first + 1 : past_end + 1])
        backend.drop(0)
        progress(model.num_layers + number + 1, total)
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
