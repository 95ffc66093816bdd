"""HTML pages that load nothing: what the report of a build and that of a bisection share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llmopt.evaluation.operators import short_name
from llmopt.optimizer.gates import COSINES

__all__ = ["Segment", "measured", "megabytes", "nats", "rendered", "segments"]

_WIDTH = 1000
"""Of a bar, in the units of its SVG."""

COLOURS = tuple(f"c{number}" for number in range(9))
"""CSS classes; the last one is grey."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a bar.

    Attributes:
        name: What it stands for.
        value: How much of it.
        text: The value for people.
        colour: Its CSS class.
        x: Where it begins.
        width: Of 1000.
    """

    name: str
    value: float
    text: str
    colour: str
    x: float
    width: float


def segments(
    values: Mapping[str, float],
    order: Sequence[str],
    *,
    total: float,
    texts: Mapping[str, str] | None = None,
    colours: Sequence[str] = COLOURS,
) -> list[Segment]:
    """The pieces of one bar.

    Args:
        values: Name -> value; zeros have no piece.
        order: The names of all bars of a plot in the order of their colours; the last colour is that of all others.
        total: What a whole bar stands for.
        texts: Name -> the value for people.
        colours: CSS classes.
    """
    found, x = [], 0.0
    for index, name in enumerate(order):
        value = values.get(name, 0)
        if not value:
            continue
        width = _WIDTH * value / total
        text = f"{value:,}" if texts is None else texts[name]
        found.append(Segment(name, value, text, colours[min(index, len(colours) - 1)], round(x, 2), round(width, 2)))
        x += width
    return found


def rendered(template: str, facts: Mapping[str, Any]) -> str:
    """The page that ``evaluation/templates/`` has for ``facts``."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short_name, "megabytes": megabytes, "largest": _largest, "nats": nats}
    return environment.get_template(template).render(facts)


def measured(metric: str, value: float) -> str:
    """The value of a metric for people."""
    if metric == "top1":
        return f"{value:.2%}"
    if metric in COSINES:
        return f"{value:.5f}"
    return nats(value) if metric == "kl" else f"{value:.3f}"


def nats(value: float, *, signed: bool = False) -> str:
    """A KL divergence, or a change of one: four decimals, or the power of ten where those would be zeros."""
    if not value:
        return "0"
    form = ".1e" if abs(value) < 5e-5 else ".4f"
    return format(value, f"+{form}" if signed else form)


def megabytes(size: float) -> str:
    """Bytes for people: ``138.2 MB``."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _largest(values: Iterable[float | None]) -> float:
    return max((value for value in values if value is not None), default=0.0)
