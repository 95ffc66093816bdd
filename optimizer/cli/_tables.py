"""Tables that several commands print."""

from collections.abc import Sequence

from rich.table import Table

from llmopt.optimizer.manifest import Measurement, Verdict

__all__ = ["gates_table", "measurements_table"]


def measurements_table(measurements: Sequence[Measurement]) -> Table:
    """The engine against the source model, a row per metric and text."""
    table = Table(title="engine against source model", title_justify="left")
    for name in ("metric", "engine", "source", "change", "text", "tokens"):
        table.add_column(name, justify="left" if name in ("metric", "text") else "right")
    for found in measurements:
        source, change = "", ""
        if found.source is not None:
            source, change = f"{found.source:.3f}", f"{found.value / found.source - 1:+.2%}"
        table.add_row(found.metric, _value(found), source, change, found.data, f"{found.tokens:,}")
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


def _value(found: Measurement) -> str:
    if found.metric == "top1":
        return f"{found.value:.2%}"
    return f"{found.value:.4f}" if found.metric == "kl" else f"{found.value:.3f}"
