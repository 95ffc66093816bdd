"""Runs an encoder's engine: token ids of texts in, a vector of each out. In ONNX Runtime, or by what others open."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.manifest import EncoderEngine
from llmopt.runtime.backends.base import ExecutionError, FloatArray
from llmopt.runtime.backends.session import check_features, open_session, ort_errors

__all__ = ["Calls", "EncoderBackend", "open_encoder_backend"]

_VECTORS = "sentence_embedding"

_CALL_TOKENS = 1024
"""In one call, padding included: what a layer makes of more does not fit a cache, and each token of 32 texts of
128 tokens took 15 to 20 % longer than in calls of 8 texts."""


class Calls(Protocol):
    """What executes calls, such as a session of ONNX Runtime."""

    def run(self, names: Sequence[str], feeds: dict[str, np.ndarray], /) -> Sequence[Any]:
        """The outputs of these names."""


def open_encoder_backend(directory: Path, engine: EncoderEngine, *, threads: int) -> "EncoderBackend":
    """Load ``engine`` of the build in ``directory`` in ONNX Runtime.

    Args:
        directory: The build.
        engine: One of its manifest's encoders.
        threads: Calls that run at the same time, or threads that share one call where there is only one.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UnsupportedError: The engine needs something this version of llmopt or of ONNX Runtime cannot do.
    """
    check_features(engine.features)
    if engine.target != "cpu":
        raise UnsupportedError(f"this version executes encoders' engines for the target cpu, not {engine.target}")
    opened = partial(open_session, directory / engine.path)
    backend = EncoderBackend(opened, engine, threads, call_tokens=_CALL_TOKENS, errors=ort_errors())
    backend.session(threads)
    return backend


class EncoderBackend:
    """One engine, loaded.

    Where texts are enough for several calls, each call has one thread: threads that share one have to wait for each
    other at every operator, and on two busy cores two calls side by side took little more than half as long. The
    session for that is opened when it is first needed, with the weights once more in memory.

    Args:
        open_with: Opens a session with this many threads.
        engine: Whose session it is.
        threads: See ``open_encoder_backend``.
        call_tokens: In one call, padding included.
        errors: What sessions raise when a call fails, besides ``ExecutionError``.
    """

    def __init__(
        self,
        open_with: Callable[[int], Calls],
        engine: EncoderEngine,
        threads: int,
        *,
        call_tokens: int,
        errors: tuple[type[Exception], ...] = (),
    ) -> None:
        self.engine = engine
        self._open = open_with
        self._threads = threads
        self._call_tokens = call_tokens
        self._sessions: dict[int, Calls] = {}
        self._takes_types = "token_type_ids" in [each.name for each in engine.inputs]
        self._errors = errors

    def session(self, threads: int) -> Calls:
        """The session whose calls have this many threads."""
        if threads not in self._sessions:
            self._sessions[threads] = self._open(threads)
        return self._sessions[threads]

    def vectors(
        self,
        texts: Sequence[Sequence[int]],
        *,
        token_types: Sequence[Sequence[int]] | None = None,
        batch: int = 32,
    ) -> FloatArray:
        """The vector of each text, float32 ``[n, d]``.

        Texts of about equal length share a call, so little is computed for padding.

        Args:
            texts: The token ids of each, special ones included; none is empty.
            token_types: The type of each token, of encoders whose tokens have types; None: all of the first.
            batch: Texts in one call, at the most: fewer where they are long, or where threads would be idle.

        Raises:
            InputError: A text is empty, longer than the engine takes, or has an id outside the vocabulary.
            ExecutionError: A run failed.
        """
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        self._check(texts, lengths)
        found = np.empty((len(texts), self.engine.hidden_size), np.float32)
        budget = min(self._call_tokens, -(-int(lengths.sum()) // self._threads))
        most = min(batch, self.engine.slots or batch)
        calls = list(_calls(np.argsort(lengths, kind="stable"), lengths, most, budget))
        session = self.session(1 if len(calls) > 1 else self._threads)

        def run(rows: np.ndarray) -> None:
            found[rows] = self._run(session, self._feeds(rows, texts, token_types))

        with ThreadPoolExecutor(self._threads) as pool:
            # The longest first: the short ones fill what is left at the end.
            list(pool.map(run, reversed(calls)))
        return found

    def _feeds(
        self, rows: np.ndarray, texts: Sequence[Sequence[int]], token_types: Sequence[Sequence[int]] | None
    ) -> dict[str, np.ndarray]:
        """The inputs of a call of some texts."""
        lengths = np.array([len(texts[i]) for i in rows])
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        feeds = {"input_ids": _padded([texts[i] for i in rows], mask, self.engine.pad_token), "attention_mask": mask}
        if self._takes_types:
            types = [[0] * len(texts[i]) if token_types is None else token_types[i] for i in rows]
            feeds["token_type_ids"] = _padded(types, mask, 0)
        return feeds

    def _check(self, texts: Sequence[Sequence[int]], lengths: np.ndarray) -> None:
        if len(texts) and not 0 < lengths.min() <= lengths.max() <= self.engine.capacity:
            raise InputError(
                f"a text has {lengths.min() or lengths.max()} tokens, the engine takes 1 to {self.engine.capacity}",
                hint="cut the text, or split it",
            )
        for text in texts:
            if not 0 <= min(text) <= max(text) < self.engine.vocab_size:
                raise InputError(f"token ids go from 0 to {self.engine.vocab_size - 1}, not {min(text)} to {max(text)}")

    def _run(self, session: Calls, feeds: dict[str, np.ndarray]) -> FloatArray:
        try:
            (vectors,) = session.run([_VECTORS], feeds)
        except self._errors as error:
            raise ExecutionError(f"the engine failed: {error}") from error
        made: FloatArray = vectors
        return made


def _calls(order: np.ndarray, lengths: np.ndarray, batch: int, budget: int) -> Iterator[np.ndarray]:
    """The texts of each call: neighbours in ``order``, which goes from short to long, of ``budget`` tokens at most."""
    first = 0
    while first < len(order):
        past_end = first + 1
        while past_end < min(first + batch, len(order)):
            if lengths[order[past_end]] * (past_end + 1 - first) > budget:
                break
            past_end += 1
        yield order[first:past_end]
        first = past_end


def _padded(rows: Sequence[Sequence[int]], mask: np.ndarray, padding: int) -> np.ndarray:
    """int64 ``[n, t]``: the rows side by side where ``mask`` is 1, ``padding`` elsewhere."""
    padded = np.full(mask.shape, padding, np.int64)
    padded[mask > 0] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return padded
