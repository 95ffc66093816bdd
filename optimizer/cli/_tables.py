"""Tables that several commands print."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmopt.optimizer.manifest import Measurement, Verdict

if TYPE_CHECKING:
    from llmopt.evaluation.bisect import Bisection, Step
    from llmopt.evaluation.operators import Effect
    from llmopt.evaluation.tuning import Trial
    from llmopt.optimizer.tuning import Tuning

__all__ = [
    "bisection_table", "gates_table", "graph_passes_table", "measurements_table", "operators_table", "trials_table",
]  # fmt: skip


_BAR = 12
"""Cells of the longest bar of a plot."""


def bisection_table(bisection: "Bisection") -> Table:
    """A row per step with a bar for its KL, of which red is what the step added beyond the noise."""
    from llmopt.evaluation.bisect_report import longest_bar
    from llmopt.evaluation.pages import nats

    table = Table(
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        title="KL divergence from the source model, nats per token",
        title_justify="left",
        caption="in parentheses: noise, within three standard errors (±)",
        caption_justify="left",
    )
    table.add_column("step", overflow="fold")
    for name in ("KL", "top-1", "change", "±", "applied", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=_BAR)
    longest = longest_bar(bisection)
    kinds = [None, *(step.kind for step in bisection.steps)]
    for step, before in zip(bisection.steps, kinds, strict=False):
        is_pass = step.kind in ("weight pass", "graph pass")
        if is_pass and step.kind != before:
            table.add_row(f"{step.kind}es", style="dim")
        change = nats(step.change, signed=True) if step.changed else "unchanged"
        if step.is_noise and step.change:
            change = f"({change})"
        table.add_row(
            f"  {step.name}" if is_pass else step.name,
            nats(step.kl),
            f"{step.top1:.1%}",
            "" if step.kind == "source" else Text(change, "dim" if step.is_noise else ""),
            Text(nats(step.error), "dim") if step.error else "",
            "" if step.applied is None else str(step.applied),
            f"{step.seconds:.0f}",
            _bar(step, longest),
        )
    return table


def _bar(step: "Step", longest: float) -> Text:
    from llmopt.evaluation.bisect_report import shares

    kept, _ = shares(step)
    blue, whole = round(_BAR * kept / longest), round(_BAR * step.kl / longest)
    return Text.assemble(("█" * blue, "blue"), ("█" * (whole - blue), "red"))


def measurements_table(measurements: Sequence[Measurement]) -> Table:
    """The engine against the source model, a row per metric and text."""
    from llmopt.evaluation.pages import measured

    table = Table(title="engine against source model", title_justify="left")
    for name in ("metric", "engine", "source", "change", "text", "tokens"):
        table.add_column(name, justify="left" if name in ("metric", "text") else "right")
    for found in measurements:
        source, change = "", ""
        if found.source is not None:
            source, change = f"{found.source:.3f}", f"{found.value / found.source - 1:+.2%}"
        table.add_row(
            found.metric, measured(found.metric, found.value), source, change, found.data, f"{found.tokens:,}"
        )
    return table


def gates_table(verdict: Verdict) -> Table:
    """What the recipe accepts, and whether it got that."""
    table = Table(title=f"gates: {verdict.status}", title_justify="left")
    for name in ("gate", "limit", "value", "passed"):
        table.add_column(name)
    for result in verdict.gates:
        limits = {name: result.gate[name] for name in ("max", "min", "max_increase") if name in result.gate}
        limit = ", ".join(f"{name} {value:g}" for name, value in limits.items())
        style = None if result.passed else "red"
        metric = f"{result.gate['metric']} on {result.gate.get('data', 'sampled')}"
        table.add_row(metric, limit, f"{result.value:.4g}", "yes" if result.passed else "no", style=style)
    return table


def graph_passes_table(engine: str, effects: "Sequence[Effect]") -> Table:
    """How many operators each graph pass found and left, and below its name which ones went and came."""
    from llmopt.evaluation.operators import short_name

    table = Table(title=f"graph passes of {engine}", title_justify="left")
    table.add_column("pass")
    for name in ("applied", "operators"):
        table.add_column(name, justify="right", no_wrap=True)
    for effect in effects:
        change = ", ".join(f"{count:+d} {short_name(name)}" for name, count in effect.changes.items())
        lines: list[RenderableType] = [effect.name, Padding(change, (0, 0, 0, 2), style="dim")]
        before, after = sum(effect.before.values()), sum(effect.after.values())
        table.add_row(Group(*lines[: 1 + bool(change)]), str(effect.applied), f"{before:,} → {after:,}")
    return table


def operators_table(operators: Mapping[str, int], layers: int) -> Table:
    """An engine's operators, the most frequent first, and how many of them a decoder layer has."""
    table = Table(title="operators of the engine", title_justify="left")
    table.add_column("operator", no_wrap=True)
    for name in ("nodes", "per layer"):
        table.add_column(name, justify="right")
    for name, count in sorted(operators.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(name, f"{count:,}", f"{count / layers:.2f}")
    total = sum(operators.values())
    table.add_section()
    table.add_row("all", f"{total:,}", f"{total / layers:.2f}")
    return table


def trials_table(trials: "Sequence[Trial]", tuning: "Tuning") -> Table:
    """A row per trial of a search, the best one first; those that no other is better than are starred."""
    from llmopt.evaluation.pages import megabytes, nats
    from llmopt.evaluation.tuning import ranked, undominated

    table = Table(
        title=f"trials, best {tuning.objective} first",
        title_justify="left",
        caption="*: accepted, and no other trial is as good in everything",
        caption_justify="left",
    )
    table.add_column("trial", justify="right", no_wrap=True)
    for path in tuning.search:
        table.add_column(path.rpartition(".")[2])
    for name in ("size", "KL", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    chosen = {each.number for each in undominated(trials, tuning)}
    for trial in ranked(trials, tuning):
        facts = ("", "", "")
        if trial.is_built:
            facts = (megabytes(trial.bytes), nats(trial.kl), f"{trial.tokens_per_second:.0f}")
        values = [str(trial.values[path]) for path in tuning.search]
        status = f"{trial.status}: {trial.message}" if trial.message else trial.status
        number = f"{'*' if trial.number in chosen else ''}{trial.number}"
        table.add_row(number, *values, *facts, status, style=None if trial.status == "accepted" else "dim")
    return table
