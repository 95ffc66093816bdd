"""What ``auto_bits`` chose among, for the report: the table of budgets in its pass record as a plot and as bars."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmopt.evaluation.pages import Segment, nats, segments
from llmopt.evaluation.scatter import Mark, Scatter, axis_of, scatter

__all__ = ["Choice", "Choices", "choices_of"]

_UNITS = {"bits": ("bits per weight", 1.0), "bytes": ("weights of the engine, MB", 1e6), "milliseconds": ("ms", 1.0)}
"""Kind of budget -> its axis, and what its numbers are divided by."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One line of the table.

    Attributes:
        spent: In words.
        kl: The predicted divergence, nats per token, in words.
        bar: The share of linears in each scheme.
        is_taken: Whether the build has it.
    """

    spent: str
    kl: str
    bar: list[Segment]
    is_taken: bool


@dataclass(frozen=True, slots=True)
class Choices:
    """All of them.

    Attributes:
        plot: Divergence against what is spent.
        rows: In the order of what they spend.
        legend: A piece for each scheme.
    """

    plot: Scatter
    rows: list[Choice]
    legend: list[Segment]


def choices_of(table: Sequence[Mapping[str, Any]]) -> Choices:
    """The picture of ``pareto``, as ``auto_bits`` records it: budget, ``kl``, ``shares`` and ``chosen`` of each row."""
    kind = next(name for name in _UNITS if name in table[0])
    title, unit = _UNITS[kind]
    schemes = sorted({name for row in table for name in row["shares"]})
    points, rows = [], []
    for row in table:
        spent, is_taken = row[kind] / unit, bool(row.get("chosen"))
        texts = {name: f"{share:.0%}" for name, share in row["shares"].items()}
        words = f"{spent:.3f}"
        mark = Mark("c4" if is_taken else "c0", "chosen" if is_taken else "", f"{words}: KL {nats(row['kl'])}")
        points.append((spent, row["kl"], mark))
        rows.append(Choice(words, nats(row["kl"]), segments(row["shares"], schemes, total=1, texts=texts), is_taken))
    x = axis_of([point[0] for point in points], title, "{:.4g}".format)
    y = axis_of([point[1] for point in points], "predicted KL, nats per token", "{:.4g}".format)
    legend = segments(dict.fromkeys(schemes, 1.0), schemes, total=len(schemes), texts=dict.fromkeys(schemes, ""))
    return Choices(scatter(x, y, points), rows, legend)
