"""Scatter plots as plain SVG: where points, ticks and grid lines are."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Axis", "Mark", "Scatter", "axis_of", "scatter"]

_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 44
_LOGARITHMIC_FROM = 20
"""The ratio of largest to smallest value from which an axis is logarithmic."""


@dataclass(frozen=True, slots=True)
class Axis:
    """From the values of one direction to shares of its length.

    Attributes:
        title: What it shows, with the unit.
        low: The value at its beginning.
        high: The value at its end.
        is_log: Whether equal ratios are equally far apart.
        ticks: The values that are written.
        words: A value for people.
    """

    title: str
    low: float
    high: float
    is_log: bool
    ticks: tuple[float, ...]
    words: Callable[[float], str]

    def share(self, value: float) -> float:
        """Where ``value`` is: 0 at the beginning, 1 at the end."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True)
class Mark:
    """What stands at a point.

    Attributes:
        colour: Its CSS class.
        label: Beside it.
        title: What it says when it is pointed at.
    """

    colour: str
    label: str
    title: str


@dataclass(frozen=True, slots=True)
class Scatter:
    """What a template draws, in the units of an SVG of ``width`` and ``height``.

    Attributes:
        points: x, y, and what stands there.
        columns: x and text of each tick of the horizontal axis.
        rows: y and text of each tick of the vertical axis.
        limit: y of the line that points have to be below; None for no line.
    """

    x_title: str
    y_title: str
    points: tuple[tuple[float, float, Mark], ...]
    columns: tuple[tuple[float, str], ...]
    rows: tuple[tuple[float, str], ...]
    limit: float | None
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    right: int = _WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = _HEIGHT - _BOTTOM


def axis_of(values: Sequence[float], title: str, words: Callable[[float], str]) -> Axis:
    """An axis on which all of ``values``, finite ones, have room.

    Returns:
        A logarithmic one where they are positive and far apart, else one with three to seven ticks.
    """
    low, high = min(values), max(values)
    if low > 0 and high / low >= _LOGARITHMIC_FROM:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        ticks = tuple(10.0**power for power in range(first, last + 1))
        return Axis(title, ticks[0], ticks[-1], True, ticks, words)
    room = (high - low or abs(high) or 1.0) * 0.08
    begin = max(0.0, low - room) if low >= 0 else low - room
    end = high + room
    step = _step((end - begin) / 4)
    ticks = tuple(step * each for each in range(math.ceil(begin / step), math.floor(end / step) + 1))
    return Axis(title, begin, end, False, ticks, words)


def _step(wanted: float) -> float:
    """1, 2 or 5 times a power of ten, at most ``wanted``."""
    power = 10.0 ** math.floor(math.log10(wanted))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= wanted * (1 + 1e-9))


def scatter(x: Axis, y: Axis, points: Sequence[tuple[float, float, Mark]], *, limit: float | None = None) -> Scatter:
    """A plot of ``points``, each as its two values and what stands there; ``limit`` is a value of ``y``."""

    def across(value: float) -> float:
        return round(_LEFT + x.share(value) * (_WIDTH - _LEFT - _RIGHT), 1)

    def down(value: float) -> float:
        return round(_HEIGHT - _BOTTOM - y.share(value) * (_HEIGHT - _TOP - _BOTTOM), 1)

    return Scatter(
        x.title,
        y.title,
        tuple((across(a), down(b), what) for a, b, what in points),
        tuple((across(tick), x.words(tick)) for tick in x.ticks),
        tuple((down(tick), y.words(tick)) for tick in y.ticks),
        down(limit) if limit is not None and y.low <= limit <= y.high else None,
    )
