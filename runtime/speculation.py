"""Guesses the next tokens of a sequence, so that one call can verify several instead of computing one.

A guess is verified by choosing a token at each of its places from the model's own logits, as if nothing had been
guessed, until one differs. For greedy answers this accepts exactly the tokens that the model would have chosen. For
sampled ones it is rejection sampling (Leviathan et al. 2023, arXiv:2211.17192) where the proposal is certain, q = 1: a
guess x is taken with probability p(x), and what replaces it is distributed as p without x.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from llmopt.runtime.backends.base import Backend, FloatArray, IntArray
from llmopt.runtime.scheduling.pace import moved

__all__ = ["DraftEngine", "Drafter", "PromptLookup", "Speculation"]

_WEIGHT = 0.1
"""Of a new measurement in a moving average."""

_RETRY = 64
"""Decode calls after which a guess is tried again where guessing did not pay."""


class Drafter(Protocol):
    """What guesses."""

    @property
    def most_sequences(self) -> int:
        """Sequences that it can guess for in turn without starting over."""

    def propose(self, ids: IntArray, most: int) -> Sequence[int]:
        """Up to ``most`` tokens that may follow ``ids``, int64 ``[tokens]``; none where it has no idea."""


@dataclass(frozen=True, slots=True)
class PromptLookup:
    """Guesses that what followed the last few tokens before follows them again (Saxena 2023, prompt lookup decoding).

    Attributes:
        longest: Tokens at the end that are looked for first.
        shortest: Tokens at the end that are looked for last.
        most_sequences: See ``Drafter``.
    """

    longest: int = 4
    shortest: int = 2
    most_sequences: int = 4

    def propose(self, ids: IntArray, most: int) -> Sequence[int]:
        """See ``Drafter.propose``."""
        for length in range(min(self.longest, len(ids) - 1), self.shortest - 1, -1):
            windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], length)
            found = np.flatnonzero((windows == ids[-length:]).all(axis=1))
            if len(found):
                # The latest place that has enough behind it, else the earliest, which has most.
                enough = found[found + length + most <= len(ids)]
                begin = int(enough[-1] if len(enough) else found[0]) + length
                return [int(token) for token in ids[begin : begin + most]]
        return []


@dataclass(slots=True)
class DraftEngine:
    """Lets a smaller model of the same vocabulary guess, greedily.

    Attributes:
        backend: Of the smaller model; one slot of it is used.
        most_sequences: See ``Drafter``.
    """

    backend: Backend
    most_sequences: int = 1
    _held: IntArray = field(default_factory=lambda: np.empty(0, np.int64))

    def propose(self, ids: IntArray, most: int) -> Sequence[int]:
        """See ``Drafter.propose``.

        Raises:
            ExecutionError: A run of the smaller model failed.
        """
        most = min(most, self.backend.capacity - len(ids))
        if most <= 0:
            return []
        logits = self._read(ids)
        drafted = [int(logits.argmax())]
        while len(drafted) < most:
            place = np.array([len(ids) + len(drafted) - 1])
            drafted.append(int(self.backend.decode(np.array(drafted[-1:]), place)[0].argmax()))
        self._held = np.concatenate([ids, np.array(drafted[:-1], np.int64)])
        return drafted

    def _read(self, ids: IntArray) -> FloatArray:
        """Write what the slot does not hold yet.

        Returns:
            The logits behind the last token, ``[vocab]``.
        """
        length = min(len(ids) - 1, len(self._held))
        differs = ids[:length] != self._held[:length]
        start = int(differs.argmax()) if differs.any() else length
        self._held = self._held[:0]  # a run that fails leaves nothing of use
        chunk = self.backend.engine.max_chunk
        for first in range(start, len(ids), chunk):
            part = ids[first : first + chunk]
            logits = self.backend.prefill(0, part, first, np.array([len(part) - 1]))
        last: FloatArray = logits[0]
        return last


@dataclass(slots=True)
class Speculation:
    """When to guess, and how much.

    A guess of a sequence is verified in a call of its own, so guessing for many sequences costs many calls where
    decoding costs one. What both cost, and how many guesses are right, is measured while it runs.

    Attributes:
        drafter: What guesses.
        tokens: Guessed at once.
    """

    drafter: Drafter
    tokens: int = 5
    _gained: float = 0.0
    _verify_seconds: float = 0.0
    _decode_seconds: dict[int, float] = field(default_factory=dict)
    _skipped: int = 0

    def pays(self, decoding: int) -> bool:
        """Whether guessing for each of ``decoding`` sequences is likely faster than decoding them together."""
        if not 0 < decoding <= self.drafter.most_sequences:
            return False
        decode = self._decode_seconds.get(decoding)
        if decode is None:  # what it is compared with is measured first
            return False
        if not self._verify_seconds or self._gained / self._verify_seconds > decoding / decode:
            return True
        self._skipped += 1
        if self._skipped < _RETRY:
            return False
        self._skipped = 0
        return True

    def note_decode(self, decoding: int, seconds: float) -> None:
        """Learn from a decode call of ``decoding`` sequences."""
        self._decode_seconds[decoding] = moved(self._decode_seconds.get(decoding, 0.0), seconds, _WEIGHT)

    def note_verify(self, gained: float, seconds: float) -> None:
        """Learn from a guess: how many tokens its verification yielded, and the seconds of both."""
        self._gained = moved(self._gained, gained, _WEIGHT)
        self._verify_seconds = moved(self._verify_seconds, seconds, _WEIGHT)
