"""The frame of a plot: a grid with numbers, linear to the right and logarithmic upwards, and the SVG around it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["COLOURS", "Axes", "svg"]

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#3ca951", "#a463f2", "#9aa1ab")


@dataclass(frozen=True, slots=True)
class Axes:
    """Where numbers lie on the picture.

    Attributes:
        left: Of the frame, in pixels.
        right: The same.
        top: The same.
        bottom: The same.
        first: The number at the left.
        last: The number at the right.
        low: The power of ten at the bottom.
        high: The power of ten at the top.
    """

    left: float
    right: float
    top: float
    bottom: float
    first: float
    last: float
    low: int
    high: int

    def x(self, value: float) -> float:
        """From the left."""
        return self.left + (self.right - self.left) * (value - self.first) / (self.last - self.first)

    def y(self, value: float) -> float:
        """From the top."""
        share = (self.high - math.log10(value)) / (self.high - self.low)
        return self.top + (self.bottom - self.top) * share

    def drawn(self, ticks: Sequence[tuple[float, str]], *, across: str, upwards: str) -> list[str]:
        """Lines of the grid with their numbers, and what the axes are.

        Args:
            ticks: Numbers to the right and how they are written.
            across: What lies to the right.
            upwards: What lies upwards.
        """
        shapes = []
        for power in range(self.low, self.high + 1):
            y = self.y(10.0**power)
            shapes.append(f'<path d="M{self.left} {y:.1f}H{self.right}" stroke="#ccd"/>')
            shapes.append(f'<text x="{self.left - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
        for value, written in ticks:
            x = self.x(value)
            shapes.append(f'<path d="M{x:.1f} {self.top}V{self.bottom}" stroke="#eef"/>')
            shapes.append(f'<text x="{x:.1f}" y="{self.bottom + 18}" text-anchor="middle">{written}</text>')
        middle, height = (self.left + self.right) / 2, (self.top + self.bottom) / 2
        shapes.append(f'<text x="{middle}" y="{self.bottom + 44}" text-anchor="middle">{across}</text>')
        turned = f"translate({self.left - 58} {height}) rotate(-90)"
        return [*shapes, f'<text transform="{turned}" text-anchor="middle">{upwards}</text>']


def svg(title: str, body: Sequence[str], *, width: int, height: int, left: int) -> str:
    """A picture that loads nothing: ``body`` below its title, which begins at ``left``."""
    style = "font-family:system-ui,sans-serif;font-size:12px"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" style="{style}">'
    written = f'<text x="{left}" y="26" font-size="16">{escape(title)}</text>'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#fff"/>', written, *body, "</svg>\n"])
