"""A bisection for programs, as JSON, and for people, as a page that loads nothing."""

from dataclasses import asdict
from typing import Any

from llmopt.evaluation.bisect import Bisection, Step
from llmopt.evaluation.pages import nats, rendered, segments

__all__ = ["bisection_facts", "bisection_page", "longest_bar", "shares"]

_COLOURS = ("c0", "c2")


def bisection_facts(bisection: Bisection) -> dict[str, Any]:
    """What docs/json-events.md describes, as plain data."""
    text = bisection.text
    windows, tokens = text.ids.shape
    worst = bisection.worst
    return {
        "model": bisection.model,
        "text": {"name": text.name, "digest": text.digest, "windows": windows, "tokens": tokens},
        "steps": [{**asdict(step), "is_noise": step.is_noise} for step in bisection.steps],
        "worst": None if worst is None else worst.name,
    }


def bisection_page(bisection: Bisection) -> str:
    """The table with a bar for each step."""
    longest = longest_bar(bisection)
    order = ("before the step", "added by the step, beyond noise")
    rows = []
    for step in bisection.steps:
        kept, added = shares(step)
        texts = {order[0]: nats(kept), order[1]: nats(added)}
        bar = segments({order[0]: kept, order[1]: added}, order, total=longest, texts=texts, colours=_COLOURS)
        rows.append({"step": step, "bar": bar})
    facts = bisection_facts(bisection)
    name = bisection.model.rstrip("/").rpartition("/")[2]
    return rendered(
        "bisect.html",
        {
            **facts,
            "title": f"Bisection of {name}",
            "name": name,
            "rows": rows,
            "last": bisection.steps[-1],
            "conclusion": bisection.conclusion,
            "legend": segments(
                dict.fromkeys(order, 1), order, total=2, texts=dict.fromkeys(order, ""), colours=_COLOURS
            ),
        },
    )


def longest_bar(bisection: Bisection) -> float:
    """The KL of the longest bar, in nats per token: of steps that lose nothing, rounding is not drawn large."""
    return max(1e-6, *(step.kl for step in bisection.steps))


def shares(step: Step) -> tuple[float, float]:
    """The KL of a step as what was there before, and what the step added beyond the noise; they sum up to it."""
    added = 0.0 if step.is_noise else min(max(0.0, step.change), step.kl)
    return step.kl - added, added
