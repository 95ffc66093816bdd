"""What is shown of a comparison: servers that are always busy, and how long people wait at a given load."""

import math
from collections.abc import Sequence
from statistics import median

from llmopt.benchmarks.load.entrant import Entrant
from llmopt.benchmarks.load.figures import Latency, latency
from llmopt.benchmarks.load.plot import Line, Panel
from llmopt.benchmarks.report import markdown

__all__ = ["busy_table", "latency_panels", "latency_table"]

_COLUMNS = (("first_p50", 1, 3), ("first_p99", 1, 3), ("next_p50", 1000, 1), ("next_p99", 1000, 1))
"""Of ``Latency``: what seconds are multiplied with, and the digits shown."""


def busy_table(entrants: Sequence[Entrant], clients: Sequence[int]) -> str:
    """Tokens per second of clients that are always busy, memory, and what a prefix that was seen saves.

    Args:
        entrants: The first one is what the others are compared with.
        clients: The columns.
    """
    header = ["server", "works on"]
    for count in clients:
        header += [f"tokens/s, {count} clients", "llmopt is", "by round"]
    header += ["peak memory, MB", "new prefix, s", "seen prefix, s"]
    rows = []
    for entrant in entrants:
        row = [entrant.contender.title, entrant.contender.at_once]
        if entrant.error is not None:
            rows.append([*row, f"failed: {entrant.error}".replace("|", "/"), *[""] * (len(header) - 3)])
            continue
        measured = entrant.measured
        for count in clients:
            base = None if entrant is entrants[0] else entrants[0].measured.throughput.get(count, [])
            row += _against(measured.throughput[count], base)
        row.append(f"{measured.peak_bytes / 1e6:,.0f}")
        row += [f"{median(times):.3f}" if times else "-" for times in (measured.cold, measured.warm)]
        rows.append(row)
    return markdown(header, rows)


def _against(theirs: Sequence[float], ours: Sequence[float] | None) -> list[str]:
    """Tokens per second, and how many times as many ours does: the median of rounds, and the least and the most."""
    ratios = [a / b for a, b in zip(ours or (), theirs, strict=False) if b]
    if not ratios:
        return [f"{median(theirs):,.0f}", "-", "-"]
    return [f"{median(theirs):,.0f}", f"{median(ratios):.2f}x", f"{min(ratios):.2f} - {max(ratios):.2f}"]


def latency_table(entrants: Sequence[Entrant], loads: Sequence[float], seconds: float) -> str:
    """Times of all rounds together, a row for each load and server, with how many times those of ours they are.

    Args:
        entrants: The first one is what the others are compared with.
        loads: Shares of what ours does at most.
        seconds: In which requests arrived, by round.
    """
    header = ["load", "requests/s", "server", "finished"]
    header += ["first token p50, s", "p99", "next token p50, ms", "p99"]
    rows = []
    for load in loads:
        ours = _latency_of(entrants[0], load)
        for entrant in entrants:
            found = _latency_of(entrant, load)
            if found is None:
                continue
            rate = found.asked / (seconds * len(entrant.measured.open[load]))
            row = [f"{load:.0%}", f"{rate:.2f}", entrant.contender.title, f"{found.finished} of {found.asked}"]
            row += _times(found, None if entrant is entrants[0] else ours)
            rows.append(row)
    return markdown(header, rows)


def latency_panels(entrants: Sequence[Entrant]) -> list[Panel]:
    """The same as a picture shows it; a server of which nothing was measured has no line."""
    return [
        Panel(title, [_line(entrant, part) for entrant in entrants if entrant.measured.open])
        for title, part in (("first token", "first"), ("next token", "next"))
    ]


def _line(entrant: Entrant, part: str) -> Line:
    loads = sorted(entrant.measured.open)
    found = [latency for latency in (_latency_of(entrant, load) for load in loads) if latency is not None]
    p50, p99 = ([1000 * getattr(each, f"{part}_{name}") for each in found] for name in ("p50", "p99"))
    return Line(entrant.contender.title, loads, p50, p99)


def _latency_of(entrant: Entrant, load: float) -> Latency | None:
    """Of all rounds together; None where none was measured."""
    rounds = entrant.measured.open.get(load)
    return latency([answer for answers in rounds for answer in answers]) if rounds else None


def _times(found: Latency, ours: Latency | None) -> list[str]:
    """The four times, each with how many times that of ours it is."""
    cells = []
    for name, scale, digits in _COLUMNS:
        value = getattr(found, name)
        base = math.inf if ours is None else getattr(ours, name)
        ratio = f" ({value / base:.2f}x)" if math.isfinite(base) and base else ""
        cells.append(f"{value * scale:.{digits}f}{ratio}" if math.isfinite(value) else "no answer in time")
    return cells
