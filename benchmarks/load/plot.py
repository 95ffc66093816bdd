"""The plot of a comparison under load: how long people wait against the load, a line for each server."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from llmopt.benchmarks.axes import COLOURS, Axes, svg

__all__ = ["Line", "Panel", "plot"]

_LEFT, _TOP, _WIDTH, _HEIGHT, _GAP = 80, 50, 330, 420, 100
_LEGEND, _BELOW, _LINE = 250, 60, 18
"""Pixels: of a panel, between two, and of what stands beside and below."""


@dataclass(frozen=True, slots=True)
class Line:
    """A server in a panel.

    Attributes:
        label: As in the legend.
        loads: Shares of 1, ascending.
        p50: Milliseconds at each; infinite where there was no answer in time.
        p99: The same.
    """

    label: str
    loads: Sequence[float]
    p50: Sequence[float]
    p99: Sequence[float]


@dataclass(frozen=True, slots=True)
class Panel:
    """One kind of waiting.

    Attributes:
        title: What is waited for.
        lines: Of all servers, in the same order in every panel.
    """

    title: str
    lines: Sequence[Line]


def plot(title: str, panels: Sequence[Panel]) -> str:
    """An SVG: panels beside each other, the load to the right, milliseconds upwards on a logarithmic scale.

    The median is a line with dots and p99 is dashed; where there was no answer in time there is no dot.
    """
    body: list[str] = []
    for number, panel in enumerate(panels):
        left = _LEFT + number * (_WIDTH + _GAP)
        axes = _axes(panel, left)
        if axes is None:
            continue
        loads = sorted({load for line in panel.lines for load in line.loads})
        body += axes.drawn([(load, f"{load:.0%}") for load in loads], across="load", upwards=f"{panel.title}, ms")
        for line, colour in zip(panel.lines, _colours(panel.lines), strict=True):
            body += _drawn(line, line.p50, axes, colour, dashed=False)
            body += _drawn(line, line.p99, axes, colour, dashed=True)
    right = _LEFT + len(panels) * (_WIDTH + _GAP)
    body += _legend(panels[0].lines, right - _GAP + 24) if panels else []
    return svg(title, body, width=right - _GAP + _LEGEND, height=_TOP + _HEIGHT + _BELOW, left=_LEFT)


def _axes(panel: Panel, left: float) -> Axes | None:
    """None where there is nothing to draw."""
    times = [time for line in panel.lines for time in (*line.p50, *line.p99) if math.isfinite(time) and time > 0]
    loads = [load for line in panel.lines for load in line.loads]
    if not times:
        return None
    low = math.floor(math.log10(min(times)))
    return Axes(
        left=left,
        right=left + _WIDTH,
        top=_TOP,
        bottom=_TOP + _HEIGHT,
        first=min(loads) - 0.1,
        last=max(loads) + 0.1,
        low=low,
        high=max(math.ceil(math.log10(max(times))), low + 1),
    )


def _colours(lines: Sequence[Line]) -> list[str]:
    return [COLOURS[min(number, len(COLOURS) - 1)] for number in range(len(lines))]


def _drawn(line: Line, times: Sequence[float], axes: Axes, colour: str, *, dashed: bool) -> list[str]:
    places = [
        (axes.x(load), axes.y(time))
        for load, time in zip(line.loads, times, strict=True)
        if math.isfinite(time) and time > 0
    ]
    if not places:
        return []
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3 if dashed else 4}" fill="{colour}"/>' for x, y in places]
    return [f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}/>', *dots]


def _legend(lines: Sequence[Line], left: float) -> list[str]:
    shapes = []
    for number, (line, colour) in enumerate(zip(lines, _colours(lines), strict=True)):
        y = _TOP + 10 + number * _LINE
        shapes.append(f'<circle cx="{left}" cy="{y - 4}" r="5" fill="{colour}"/>')
        shapes.append(f'<text x="{left + 12}" y="{y}">{escape(line.label)}</text>')
    below = _TOP + 20 + len(lines) * _LINE
    return [*shapes, f'<text x="{left - 5}" y="{below}" fill="#667">line: median; dashed: p99</text>']
