"""Chooses the next token of every row of a batch: greedy or sampled, each row by its own options and its own generator.

The wide work (penalties, softmax, the k-th largest) is done on the whole batch at once. What a row draws depends on
nothing but its logits, its options and its generator, so it is the same alone and in any batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from llmopt.runtime.backends.base import FloatArray, IntArray

__all__ = ["Row", "Sampling", "TokenLogprob", "sample", "score"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a request's tokens are chosen.

    Attributes:
        temperature: 0, or anything too small to divide by, takes the most likely token.
        top_k: Only the k most likely tokens, and those that tie with the last of them; 0 is no limit.
        top_p: Only the fewest most likely tokens that hold this share of the probability.
        min_p: Only tokens at least this fraction as likely as the most likely one.
        repetition_penalty: Divides positive and multiplies negative logits of tokens seen in prompt or output
            (Keskar et al. 2019, arXiv:1909.05858).
        presence_penalty: Subtracted from the logit of each token of the output.
        frequency_penalty: The same, times how often it occurred.
        logit_bias: Added to the logits of single tokens, after the penalties.
        seed: Of the request's generator; None takes one from the system.
        logprobs: How many of the most likely tokens to report with each token; None reports nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None
    logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < 1e-5

    @property
    def is_penalized(self) -> bool:
        """Whether what was generated before changes the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token under the raw logits, and the most likely ones at its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Row:
    """What one request brings to the sampler.

    Args:
        sampling: Its options.
        prompt: int64 ``[tokens]``.
        output: The tokens generated so far; the owner appends to this very list.
    """

    def __init__(self, sampling: Sampling, prompt: IntArray, output: list[int]) -> None:
        self.sampling = sampling
        self.output = output
        self.prompt_tokens = np.unique(prompt) if sampling.repetition_penalty != 1 else prompt[:0]
        self.generator = np.random.Generator(np.random.Philox(sampling.seed))
        self.blocked: IntArray = np.empty(0, np.int64)
        """Tokens that may not be chosen now."""
        self._bias_tokens = np.fromiter(sampling.logit_bias, np.int64, len(sampling.logit_bias))
        self._bias_values = np.fromiter(sampling.logit_bias.values(), np.float32, len(sampling.logit_bias))

    @property
    def changes_logits(self) -> bool:
        """Whether the row's logits are not taken as they are."""
        return self.sampling.is_penalized or len(self._bias_tokens) > 0 or len(self.blocked) > 0

    def change(self, logits: FloatArray) -> None:
        """Apply penalties, bias and blocks to the row's logits, float32 ``[vocab]``, in place."""
        options = self.sampling
        if options.is_penalized:
            tokens, counts = np.unique(np.array(self.output, np.int64), return_counts=True)
            if options.repetition_penalty != 1:
                seen = np.union1d(self.prompt_tokens, tokens)
                values, penalty = logits[seen], np.float32(options.repetition_penalty)
                logits[seen] = np.where(values > 0, values / penalty, values * penalty)
            logits[tokens] -= (options.presence_penalty + options.frequency_penalty * counts).astype(np.float32)
        logits[self._bias_tokens] += self._bias_values
        logits[self.blocked] = -np.inf


def sample(logits: FloatArray, rows: Sequence[Row]) -> tuple[IntArray, list[TokenLogprob | None]]:
    """Choose one token per row and advance the generators of the rows that draw.

    Args:
        logits: float32 ``[rows, vocab]``; not modified.
        rows: One per row of ``logits``.

    Returns:
        The tokens, int64 ``[rows]``, and for rows that asked for it their log-probabilities.
    """
    changed = _changed(logits, rows)
    tokens = np.empty(len(rows), np.int64)
    greedy = [i for i, row in enumerate(rows) if row.sampling.is_greedy]
    drawn = [i for i, row in enumerate(rows) if not row.sampling.is_greedy]
    if greedy:
        tokens[greedy] = _pick(changed, greedy).argmax(axis=1)
    if drawn:
        tokens[drawn] = _draw(_pick(changed, drawn), [rows[i] for i in drawn])
    logprobs: list[TokenLogprob | None] = [None] * len(rows)
    for i, row in enumerate(rows):
        if row.sampling.logprobs is not None:
            logprobs[i] = score(logits[i : i + 1], tokens[i : i + 1], row.sampling.logprobs)[0]
    return tokens, logprobs


def score(logits: FloatArray, tokens: IntArray, top: int) -> list[TokenLogprob]:
    """Log-probabilities of given tokens.

    Args:
        logits: float32 ``[rows, vocab]``.
        tokens: int64 ``[rows]``, the token that followed at each row.
        top: How many of the most likely tokens to name.

    Returns:
        One entry per row. A token that is also among the most likely has exactly the same value in both places.
    """
    highest = logits.max(axis=1, keepdims=True)
    totals = np.log(np.exp(logits - highest).sum(axis=1, dtype=np.float64)) + highest[:, 0]
    result = []
    for row, token, total in zip(logits, tokens, totals, strict=True):
        best = _largest(row, top)
        pairs = tuple((int(i), float(row[i] - total)) for i in best)
        result.append(TokenLogprob(int(token), float(row[token] - total), pairs))
    return result


def _largest(values: FloatArray, count: int) -> IntArray:
    """Indices of the ``count`` largest values, largest first, the lower index first where values are equal."""
    if count == 0:
        return np.empty(0, np.int64)
    found = np.sort(np.argpartition(values, -count)[-count:])
    return found[np.argsort(-values[found], kind="stable")]


def _pick(logits: FloatArray, rows: list[int]) -> FloatArray:
    return logits if len(rows) == len(logits) else logits[rows]


def _changed(logits: FloatArray, rows: Sequence[Row]) -> FloatArray:
    """The logits after penalties, bias and blocks: ``logits`` itself when no row asks for any."""
    asking = [i for i, row in enumerate(rows) if row.changes_logits]
    if not asking:
        return logits
    changed = logits.copy()
    for i in asking:
        rows[i].change(changed[i])
    return changed


def _draw(logits: FloatArray, rows: Sequence[Row]) -> IntArray:
    """Draw one token per row: temperature, then min_p and top_k, then top_p of what they left.

    Args:
        logits: float32 ``[rows, vocab]``; not modified.
        rows: None of them greedy.
    """
    temperature = np.array([row.sampling.temperature for row in rows], np.float32)
    weights = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature[:, None])
    floors = np.maximum([row.sampling.min_p for row in rows], _kth_largest(weights, rows))
    result = np.empty(len(rows), np.int64)
    for i, (row, floor) in enumerate(zip(rows, floors, strict=True)):
        tokens = np.flatnonzero(weights[i] >= floor)
        result[i] = _draw_one(weights[i, tokens], tokens, row)
    return result


def _kth_largest(weights: FloatArray, rows: Sequence[Row]) -> npt.NDArray[np.float64]:
    """The weight of each row's ``top_k``-th token, 0 for rows without a limit: float64 ``[rows]``."""
    vocab = weights.shape[1]
    places = [vocab - row.sampling.top_k if 0 < row.sampling.top_k < vocab else 0 for row in rows]
    if not any(places):
        return np.zeros(len(rows))
    ordered = np.partition(weights, sorted(set(places) - {0}), axis=1)
    return np.array([ordered[i, place] if place else 0.0 for i, place in enumerate(places)])


def _draw_one(weights: FloatArray, tokens: IntArray, row: Row) -> int:
    """Draw one of ``tokens`` by inverting the cumulative sum of their weights.

    Args:
        weights: float32 ``[candidates]``, not normalized.
        tokens: int64 ``[candidates]``, ascending.
        row: Whose ``top_p`` and generator are used.
    """
    share = row.sampling.top_p
    if share < 1:
        total = weights.sum(dtype=np.float64)
        # All tokens below this weight hold less than 1 - top_p together: only the rest needs sorting.
        heavy = weights >= (1 - share) * total / len(weights)
        weights, tokens = weights[heavy], tokens[heavy]
        order = np.argsort(-weights, kind="stable")
        weights, tokens = weights[order], tokens[order]
        cumulative = np.cumsum(weights, dtype=np.float64)
        cumulative = cumulative[: int(np.searchsorted(cumulative, share * total)) + 1]
    else:
        cumulative = np.cumsum(weights, dtype=np.float64)
    place = int(np.searchsorted(cumulative, row.generator.random() * cumulative[-1], side="right"))
    return int(tokens[min(place, len(cumulative) - 1)])
