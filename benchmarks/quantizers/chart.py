"""The plot of a comparison: what each row lost against the bits it takes, as one SVG that loads nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Point", "plot"]

_WIDTH, _HEIGHT = 960, 620
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 240, 50, 60
_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#3ca951", "#a463f2", "#9aa1ab")
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
    body = [f'<text x="{_LEFT}" y="26" font-size="16">{escape(title)}</text>']
    if points:
        axes = _Axes(points)
        body += [*axes.drawn(), *_marks(points, axes)]
    style = "font-family:system-ui,sans-serif;font-size:12px"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" style="{style}">'
    return "\n".join([head, f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>', *body, "</svg>\n"])


class _Axes:
    """Where numbers lie on the picture."""

    def __init__(self, points: Sequence[Point]) -> None:
        self._first = math.floor(min(point.x for point in points)) - 0.5
        self._last = math.ceil(max(point.x for point in points)) + 0.5
        self._low = math.floor(math.log10(min(point.y for point in points)))
        self._high = max(math.ceil(math.log10(max(point.y for point in points))), self._low + 1)

    def x(self, value: float) -> float:
        """From the left."""
        width = _WIDTH - _LEFT - _RIGHT
        return _LEFT + width * (value - self._first) / (self._last - self._first)

    def y(self, value: float) -> float:
        """From the top."""
        height = _HEIGHT - _TOP - _BOTTOM
        return _TOP + height * (self._high - math.log10(value)) / (self._high - self._low)

    def drawn(self) -> list[str]:
        """Lines of the grid with their numbers, and what the axes are."""
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        shapes = []
        for power in range(self._low, self._high + 1):
            y = self.y(10.0**power)
            shapes.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#ccd"/>')
            shapes.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
        for bits in range(math.ceil(self._first), math.floor(self._last) + 1):
            x = self.x(bits)
            shapes.append(f'<path d="M{x:.1f} {_TOP}V{bottom}" stroke="#eef"/>')
            shapes.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{bits}</text>')
        middle = (_LEFT + right) / 2
        shapes.append(f'<text x="{middle}" y="{_HEIGHT - 16}" text-anchor="middle">bits per weight</text>')
        shapes.append(
            f'<text transform="translate(22 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">KL, nats/token</text>'
        )
        return shapes


def _marks(points: Sequence[Point], axes: _Axes) -> list[str]:
    """A dot and a label each; labels move down where they would lie on one another."""
    series = list(dict.fromkeys(point.series for point in points))
    shapes, taken = [], -math.inf
    for point in sorted(points, key=lambda point: axes.y(point.y)):
        colour = _COLOURS[min(series.index(point.series), len(_COLOURS) - 1)]
        x, y, text = axes.x(point.x), axes.y(point.y), _WIDTH - _RIGHT + 24
        taken = max(y, taken + _LINE)
        shapes.append(f'<path d="M{x:.1f} {y:.1f}L{text - 6} {taken:.1f}" stroke="{colour}" stroke-opacity=".35"/>')
        shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        shapes.append(f'<text x="{text}" y="{taken + 4:.1f}">{escape(point.label)}</text>')
    return shapes
