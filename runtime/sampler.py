"""Chooses the next token of every row of a batch: greedy or sampled, each row by its own options and its own generator.

The wide work (softmax, argmax, log-probabilities) is done on the whole batch at once, and what remains per row is a few
calls on a few candidates. What a row draws depends on nothing but its logits, its options and its generator, so it is
the same alone and in any batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from llmopt.optimizer.kernels import GROUP, weigh_logits
from llmopt.runtime.backends.base import FloatArray, IntArray

__all__ = ["Row", "Sampling", "TokenLogprob", "sample", "score"]

_FEW = 512
"""Weights that are sorted rather than parted."""
_BOUNDS = (1e-2, 1e-3)
"""Shares of the largest weight: tokens of more are most often all that a draw with top_p needs to look at."""


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
        self.allowed: npt.NDArray[np.bool_] | None = None
        """Tokens that may be chosen now, bool ``[vocab]``; None is all of them."""
        self._bias_tokens = np.fromiter(sampling.logit_bias, np.int64, len(sampling.logit_bias))
        self._bias_values = np.fromiter(sampling.logit_bias.values(), np.float32, len(sampling.logit_bias))

    @property
    def changes_logits(self) -> bool:
        """Whether the row's logits are not taken as they are."""
        is_limited = self.allowed is not None or len(self.blocked) > 0
        return is_limited or self.sampling.is_penalized or len(self._bias_tokens) > 0

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
        if self.allowed is not None:
            logits[~self.allowed] = -np.inf


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
    return tokens, _report(logits, tokens, rows)


def _report(logits: FloatArray, tokens: IntArray, rows: Sequence[Row]) -> list[TokenLogprob | None]:
    """The log-probabilities of the rows that asked for them."""
    result: list[TokenLogprob | None] = [None] * len(rows)
    asked = [(i, row.sampling.logprobs) for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    if asked:
        picked = [i for i, _ in asked]
        scored = score(_pick(logits, picked), tokens[picked], max(top for _, top in asked))
        for (i, top), entry in zip(asked, scored, strict=True):
            result[i] = TokenLogprob(entry.token, entry.logprob, entry.top[:top])
    return result


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
    maxima = np.maximum.reduceat(values, np.arange(0, len(values), GROUP))
    found = np.flatnonzero(values >= _bound(values, maxima, min(count, len(values))))
    return found[np.argsort(-values[found], kind="stable")[:count]]


def _bound(values: FloatArray, maxima: FloatArray, count: int) -> np.float32:
    """A bound that at least ``count`` values reach, and few others.

    The ``count``-th largest of the groups' ``maxima``: at least that many groups have a value there or above.
    Partitioning a few hundred maxima costs a tenth of partitioning the vocabulary.
    """
    return np.float32(np.partition(maxima if len(maxima) >= count else values, -count)[-count])


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


@dataclass(frozen=True, slots=True)
class _Weights:
    """What tokens weigh in a draw.

    Attributes:
        values: float32 ``[rows, vocab]``, not normalized, a row's largest is 1.
        sums: Of each ``GROUP`` neighbors, float64 ``[rows, groups]``.
        largest: The same, float32.
    """

    values: FloatArray
    sums: npt.NDArray[np.float64]
    largest: FloatArray

    @classmethod
    def of(cls, logits: FloatArray, temperatures: FloatArray) -> "_Weights":
        """Of logits float32 ``[rows, vocab]`` at each row's temperature."""
        made = weigh_logits(np.ascontiguousarray(logits), temperatures)
        if made is not None:
            return cls(*made)
        values = logits - logits.max(axis=1, keepdims=True)
        values /= temperatures[:, None]
        np.exp(values, out=values)
        starts = np.arange(0, values.shape[1], GROUP)
        sums = np.add.reduceat(values, starts, axis=1, dtype=np.float64)
        return cls(values, sums, np.maximum.reduceat(values, starts, axis=1))

    def row(self, number: int) -> "_RowWeights":
        """One row's."""
        return _RowWeights(self.values[number], self.sums[number], self.largest[number])


@dataclass(frozen=True, slots=True)
class _RowWeights:
    """One row of ``_Weights``."""

    values: FloatArray
    sums: npt.NDArray[np.float64]
    largest: FloatArray

    def at_least(self, bound: float | np.float32) -> IntArray:
        """The tokens that weigh so much, in order; groups without one are not looked at."""
        groups = np.flatnonzero(self.largest >= bound)
        if 2 * len(groups) > len(self.largest):
            return np.flatnonzero(self.values >= bound)
        tokens = (groups[:, None] * GROUP + np.arange(GROUP)).ravel()
        tokens = tokens[: int(np.searchsorted(tokens, len(self.values)))]  # the last group may be shorter
        found: IntArray = tokens[self.values[tokens] >= bound]
        return found

    def holding(self, share: float, total: float) -> IntArray:
        """Tokens among which are the fewest that hold ``share`` of ``total``, the sum of all; few, where few do."""
        for bound in _BOUNDS:
            tokens = self.at_least(bound)
            if self.values[tokens].sum(dtype=np.float64) >= share * total:
                return tokens
        # All tokens below this hold less than the rest together.
        return self.at_least((1 - share) * total / len(self.values))

    def kth_largest(self, k: int) -> float:
        """The k-th largest, or 0 when k sets no limit."""
        if not 0 < k < len(self.values):
            return 0.0
        return float(np.partition(self.values[self.at_least(_bound(self.values, self.largest, k))], -k)[-k])

    def invert(self, uniform: float) -> int:
        """``_invert`` of the cumulative sum of all, of which only one group's is computed."""
        sums = np.cumsum(self.sums)
        group = _invert(sums, uniform)
        before = sums[group - 1] if group else 0.0
        inside = before + np.cumsum(self.values[group * GROUP : (group + 1) * GROUP], dtype=np.float64)
        place = int(np.searchsorted(inside, uniform * sums[-1], side="right"))
        return group * GROUP + min(place, len(inside) - 1)


def _draw(logits: FloatArray, rows: Sequence[Row]) -> IntArray:
    """Draw one token per row: temperature, then min_p and top_k, then top_p of what they left.

    Args:
        logits: float32 ``[rows, vocab]``; not modified.
        rows: None of them greedy.
    """
    weights = _Weights.of(logits, np.array([row.sampling.temperature for row in rows], np.float32))
    return np.array([_draw_one(weights.row(number), row) for number, row in enumerate(rows)])


def _draw_one(weights: _RowWeights, row: Row) -> int:
    """Draw a token by inverting the cumulative sum of the weights that the row's limits leave."""
    options, uniform = row.sampling, row.generator.random()
    floor = max(options.min_p, weights.kth_largest(options.top_k))
    if floor == 0 and options.top_p == 1:
        return weights.invert(uniform)
    if floor > 0:
        tokens, total = weights.at_least(floor), None
    else:
        total = float(weights.sums.sum())
        tokens = weights.holding(options.top_p, total)
    left = weights.values[tokens]
    if options.top_p < 1:
        nucleus = _nucleus(left, options.top_p, total)
        tokens, left = tokens[nucleus], left[nucleus]
    return int(tokens[_invert(np.cumsum(left, dtype=np.float64), uniform)])


def _nucleus(weights: FloatArray, share: float, total: float | None) -> IntArray:
    """The fewest largest weights that hold ``share`` of the sum; of equal ones, those that come first.

    Weights are parted at their mean, and the part that the share is reached in is parted again, until few are left to
    sort: a flat distribution over 50,000 tokens costs a tenth of sorting it.

    Args:
        weights: float32 ``[tokens]``, none below 0.
        share: Above 0, at most 1.
        total: The sum of these and of others, none of which can be in the nucleus; None where there are no others.

    Returns:
        int64, their places in ascending order.
    """
    if total is None:
        total = float(weights.sum(dtype=np.float64))
    unsure = np.arange(len(weights))
    is_inside, held = np.zeros(len(weights), np.bool_), 0.0
    while len(unsure) > _FEW:
        values = weights[unsure]
        is_above = values > values.mean()
        above = unsure[is_above]
        if not len(above):  # they are all the same
            break
        mass = weights[above].sum(dtype=np.float64)
        if held + mass >= share * total:
            unsure = above
        else:
            is_inside[above], held, unsure = True, held + mass, unsure[~is_above]
    order = unsure[np.argsort(-weights[unsure], kind="stable")]
    sums = held + np.cumsum(weights[order], dtype=np.float64)
    is_inside[order[: int(np.searchsorted(sums, share * total)) + 1]] = True
    return np.flatnonzero(is_inside)


def _invert(cumulative: npt.NDArray[np.float64], uniform: float) -> int:
    """The first place whose cumulative sum is above ``uniform`` times the total."""
    place = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return min(place, len(cumulative) - 1)
