"""What answers come to: tokens per second, and percentiles of the times people wait."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from llmopt.benchmarks.load.events import Answer

__all__ = ["Latency", "first_token", "latency", "percentile", "throughput"]


@dataclass(frozen=True, slots=True)
class Latency:
    """Times in seconds; infinite where so many requests had no answer when the time was over.

    Attributes:
        first_p50: From when a request was due to the first piece of its text.
        first_p99: The same.
        next_p50: Between two pieces of one text; nearly always one token each.
        next_p99: The same.
        asked: Requests.
        finished: Of them, those with their whole answer.
    """

    first_p50: float
    first_p99: float
    next_p50: float
    next_p99: float
    asked: int
    finished: int


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of ``values`` that at least ``share`` of them do not exceed; infinite where there are none."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else math.inf


def first_token(answer: Answer) -> float:
    """Seconds from when the request was due; infinite where nothing came."""
    return answer.times[0] - answer.begun if answer.times else math.inf


def latency(answers: Sequence[Answer]) -> Latency:
    """Of requests that arrived at given times."""
    first = [first_token(answer) for answer in answers]
    following = [b - a for answer in answers for a, b in pairwise(answer.times)]
    return Latency(
        percentile(first, 0.5),
        percentile(first, 0.99),
        percentile(following, 0.5),
        percentile(following, 0.99),
        len(answers),
        sum(1 for answer in answers if answer.finish is not None),
    )


def throughput(answers: Sequence[Answer], tokens: Sequence[int], *, start: float, end: float) -> float:
    """Tokens per second that came between ``start`` and ``end``.

    Args:
        answers: Of clients that were busy all the time.
        tokens: Of each answer when it is whole. A piece of text is a token but where a character takes several: how
            many tokens a piece is on average is known from answers that are whole.
        start: In seconds; before it a server warms up.
        end: In seconds.
    """
    pieces = sum(1 for answer in answers for time in answer.times if start <= time < end)
    whole = [(len(answer.times), count) for answer, count in zip(answers, tokens, strict=False) if answer.finish]
    per_piece = sum(count for _, count in whole) / max(sum(times for times, _ in whole), 1) if whole else 1.0
    return pieces * per_piece / (end - start)
