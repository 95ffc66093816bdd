"""Which scheme each part of a model gets: the smallest predicted loss within a budget, and what others would give."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llmopt.calibration.sensitivity import Part
from llmopt.optimizer.decoder import Experts, Layer
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import Model
from llmopt.optimizer.scheme import Scheme, name_of
from llmopt.passes._budget import Budget, Costs
from llmopt.passes._knapsack import choose

__all__ = ["SchemeSearch", "by_part", "parts_of"]

_ROWS = 9
"""Budgets in the table, from the smallest possible to the largest that changes anything."""


def parts_of(
    model: Model, schemes: tuple[Scheme | None, ...], fixed: Collection[str], *, by_linear: bool
) -> list[Part]:
    """The linears of the layers that get one scheme each, in data order.

    Args:
        model: The model.
        schemes: To choose from; None stays in float. Experts get those that leave activations in float.
        fixed: Linears that are left out.
        by_linear: Whether each linear is a part, but for experts; else those that read the same input.
    """
    weight_only = tuple(scheme for scheme in schemes if scheme is None or scheme.input_activations is None)
    parts = []
    for index, layer in enumerate(model.decoder.layers):
        for modules, is_mixture in _together(layer, by_linear=by_linear):
            if left := tuple(module for module in modules if module not in fixed):
                parts.append(Part(index, left, weight_only if is_mixture else schemes))
    return parts


def _together(layer: Layer, *, by_linear: bool) -> list[tuple[tuple[str, ...], bool]]:
    """The layer's linears, and whether they are experts."""
    found: list[tuple[tuple[str, ...], bool]] = []
    for stage in layer.stages:
        modules = tuple(module for readers in stage for module in readers)
        is_mixture = isinstance(layer.mlp, Experts) and modules[0] in layer.mlp.linears
        found += [((module,), False) for module in modules] if by_linear and not is_mixture else [(modules, is_mixture)]
    return found


def by_part(parts: Sequence[Part], losses: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
    """Sensitivities in nats per token: the name of a part, which is that of its linears, -> scheme -> value."""
    return {
        _name(part): {name_of(scheme): loss for scheme, loss in zip(part.schemes, each, strict=True)}
        for part, each in zip(parts, losses, strict=True)
    }


def _name(part: Part) -> str:
    """``model.layers.0.self_attn.q_proj, k_proj, v_proj``; of many linears the first and how many more."""
    first, *others = part.modules
    if len(others) > 3:
        return f"{first} and {len(others)} more"
    return ", ".join([first, *(each.rpartition(".")[2] for each in others)])


class SchemeSearch:
    """The choices there are, and their costs.

    Args:
        budget: What may be spent.
        costs: What linears cost in its unit.
        parts: To choose schemes for.
        fixed: Other linears of the layers, with their scheme; None stays in float.
    """

    def __init__(self, budget: Budget, costs: Costs, parts: Sequence[Part], fixed: Mapping[str, Scheme | None]) -> None:
        self.costs = costs
        self._budget = budget
        self._parts = parts
        self._each = [[costs.of(part.modules, scheme) for scheme in part.schemes] for part in parts]
        self._fixed = sum(costs.of([module], scheme) for module, scheme in fixed.items())

    def check(self) -> None:
        """Raise ``PassError`` when even the cheapest choice exceeds the budget."""
        least = self._fixed + sum(map(min, self._each))
        if least > self.costs.limit:
            words = self._budget.words
            raise PassError(
                f"the budget of {words(self._budget.limit)} cannot be reached: these candidates and overrides need "
                f"{words(self.costs.shown(least))} at least",
                hint="raise the budget, or add a candidate with fewer bits or larger groups",
            )

    def choose(self, losses: Sequence[Sequence[float]]) -> list[Scheme | None]:
        """The scheme of each part."""
        return self._chosen(losses, self.costs.limit)

    def loss(self, chosen: Sequence[Scheme | None], losses: Sequence[Sequence[float]]) -> float:
        """The predicted divergence: the sum of the parts' own, in nats per token."""
        rows = zip(self._parts, chosen, losses, strict=True)
        return sum(each[part.schemes.index(scheme)] for part, scheme, each in rows)

    def table(self, losses: Sequence[Sequence[float]], chosen: Sequence[Scheme | None]) -> list[dict[str, Any]]:
        """A row for each of several budgets, and for the one that was given, in the order of what they spend."""
        least, most = sum(map(min, self._each)), sum(map(max, self._each))
        limits = [self._fixed + least + (most - least) * number / (_ROWS - 1) for number in range(_ROWS)]
        rows = [self._row(losses, self._chosen(losses, limit)) for limit in limits]
        rows = [row for number, row in enumerate(rows) if row not in rows[:number]]
        own = self._row(losses, chosen)
        rows = [row for row in rows if row != own] + [{**own, "chosen": True}]
        return sorted(rows, key=lambda row: row[self._budget.kind])

    def lines(self, losses: Sequence[Sequence[float]], chosen: Sequence[Scheme | None]) -> list[str]:
        """The table for people."""
        return [
            f"{self._budget.words(row[self._budget.kind])}: predicted KL {row['kl']:.4g}; "
            + ", ".join(f"{share:.0%} {name}" for name, share in row["shares"].items())
            + (" (chosen)" if row.get("chosen") else "")
            for row in self.table(losses, chosen)
        ]

    def _chosen(self, losses: Sequence[Sequence[float]], limit: float) -> list[Scheme | None]:
        # A table's own limit may be a rounding below what it is the sum of.
        spare = max(limit - self._fixed, sum(map(min, self._each)))
        picks = choose(self._each, losses, spare)
        return [part.schemes[pick] for part, pick in zip(self._parts, picks, strict=True)]

    def _row(self, losses: Sequence[Sequence[float]], chosen: Sequence[Scheme | None]) -> dict[str, Any]:
        rows = zip(self._parts, chosen, self._each, strict=True)
        spent = self._fixed + sum(each[part.schemes.index(scheme)] for part, scheme, each in rows)
        counts: Counter[str] = Counter()
        for part, scheme in zip(self._parts, chosen, strict=True):
            counts[name_of(scheme)] += len(part.modules)
        total = sum(counts.values())
        return {
            self._budget.kind: self.costs.shown(spent),
            "kl": self.loss(chosen, losses),
            "shares": {name: count / total for name, count in sorted(counts.items())},
        }
