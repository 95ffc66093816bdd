"""Lengths and arrivals of requests as they were recorded, scaled to a model and a machine of this size."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate, islice, pairwise
from pathlib import Path

from llmopt.optimizer.errors import InputError

__all__ = ["Trace", "arrivals", "read_trace", "scaled"]

MAX_CONTEXT, MAX_GENERATED = 512, 128
"""Tokens that the longest requests are scaled down to."""

_FRACTION = 0.99
"""Of the requests, those that are scaled; the few longer ones are cut."""

_LEAST = 4


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of their arrival.

    Attributes:
        seconds: When each arrived, from the first on.
        context: Tokens of its prompt.
        generated: Tokens of its answer.
    """

    seconds: tuple[float, ...]
    context: tuple[int, ...]
    generated: tuple[int, ...]


def read_trace(path: Path) -> Trace:
    """A trace of Azure's: a CSV file with TIMESTAMP, ContextTokens and GeneratedTokens, its lengths scaled down.

    Raises:
        InputError: The file is missing or has other columns.
    """
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
        times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
        context = [int(row["ContextTokens"]) for row in rows]
        generated = [int(row["GeneratedTokens"]) for row in rows]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is no trace of requests: {error}", hint="it needs TIMESTAMP, ContextTokens and GeneratedTokens"
        ) from error
    return Trace(
        tuple((time - times[0]).total_seconds() for time in times),
        tuple(scaled(context, MAX_CONTEXT)),
        tuple(scaled(generated, MAX_GENERATED)),
    )


def scaled(lengths: Sequence[int], longest: int) -> list[int]:
    """Lengths times one factor, such that 99 % of them are at most ``longest``; the others are cut to it.

    Returns:
        Lengths from 4 to ``longest``, in the given order.
    """
    high = sorted(lengths)[int(_FRACTION * (len(lengths) - 1))]
    factor = min(longest / high, 1.0)
    return [min(max(round(length * factor), _LEAST), longest) for length in lengths]


def arrivals(trace: Trace, start: int, tokens: Sequence[int], *, rate: float, seconds: float) -> list[float]:
    """When requests arrive that together ask for ``rate`` tokens per second: with the gaps of the trace, scaled.

    Args:
        trace: Where the gaps are from.
        start: Its first request.
        tokens: Of each answer, from the first request on.
        rate: Tokens per second over the whole time.
        seconds: The whole time.

    Returns:
        One time for each request that fits, at least two, from 0 on.
    """
    fitting = sum(1 for total in accumulate(tokens) if total <= rate * seconds)
    count = min(max(fitting, 2), len(tokens))
    places = [(start + number) % len(trace.seconds) for number in range(count + 1)]
    gaps = [max(trace.seconds[b] - trace.seconds[a], 0.0) for a, b in pairwise(places)]
    total = sum(gaps) or 1.0
    return [seconds * passed / total for passed in islice(accumulate(gaps, initial=0.0), count)]
