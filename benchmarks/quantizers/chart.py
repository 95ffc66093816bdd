"""The plot of a comparison: what each row lost against the bits it takes, as one SVG that loads nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from llmopt.benchmarks.axes import COLOURS, Axes, svg

__all__ = ["Point", "plot"]

_WIDTH, _HEIGHT = 960, 620
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 240, 50, 60
_LINE = 15
"""Height of a label."""


@dataclass(frozen=True, slots=True)
class Point:
    """A row of the table.

    Attributes:
        label: As shown beside it.
        series: Points of one series have one colour.
        x: Bits per weight.
        y: KL divergence, above 0.
    """

    label: str
    series: str
    x: float
    y: float


def plot(title: str, points: Sequence[Point]) -> str:
    """An SVG: bits per weight to the right, KL upwards on a logarithmic scale."""
    body: list[str] = []
    if points:
        axes = _axes(points)
        bits = range(math.ceil(axes.first), math.floor(axes.last) + 1)
        ticks = [(float(each), str(each)) for each in bits]
        body += axes.drawn(ticks, across="bits per weight", upwards="KL, nats/token")
        body += _marks(points, axes)
    return svg(title, body, width=_WIDTH, height=_HEIGHT, left=_LEFT)


def _axes(points: Sequence[Point]) -> Axes:
    low = math.floor(math.log10(min(point.y for point in points)))
    return Axes(
        left=_LEFT,
        right=_WIDTH - _RIGHT,
        top=_TOP,
        bottom=_HEIGHT - _BOTTOM,
        first=math.floor(min(point.x for point in points)) - 0.5,
        last=math.ceil(max(point.x for point in points)) + 0.5,
        low=low,
        high=max(math.ceil(math.log10(max(point.y for point in points))), low + 1),
    )


def _marks(points: Sequence[Point], axes: Axes) -> list[str]:
    """A dot and a label each; labels move down where they would lie on one another."""
    series = list(dict.fromkeys(point.series for point in points))
    shapes, taken = [], -math.inf
    for point in sorted(points, key=lambda point: axes.y(point.y)):
        colour = COLOURS[min(series.index(point.series), len(COLOURS) - 1)]
        x, y, text = axes.x(point.x), axes.y(point.y), _WIDTH - _RIGHT + 24
        taken = max(y, taken + _LINE)
        shapes.append(f'<path d="M{x:.1f} {y:.1f}L{text - 6} {taken:.1f}" stroke="{colour}" stroke-opacity=".35"/>')
        shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        shapes.append(f'<text x="{text}" y="{taken + 4:.1f}">{escape(point.label)}</text>')
    return shapes
