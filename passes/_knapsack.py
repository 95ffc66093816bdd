"""The choice with the smallest loss within a budget: one alternative for each of many parts."""

from collections.abc import Sequence

import numpy as np

__all__ = ["choose"]

_STEPS = 20_000
"""Into which the budget beyond the cheapest choice is divided, where costs have no coarser common unit."""


def choose(costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float) -> tuple[int, ...]:
    """Pick one alternative of every part so that the losses sum up to least, and the costs to ``budget`` at most.

    The multiple-choice knapsack, by dynamic programming over costs in steps (Kellerer, Pferschy and Pisinger 2004,
    Knapsack Problems, chapter 11). Exact where costs are integers whose differences have a common divisor of at least
    one step. Elsewhere each part's cost is rounded up to a step, 1/20000 of what can be spent, so the budget is never
    exceeded; what the rounding left unspent then goes to the single changes that gain most for it.

    Args:
        costs: Of each part's alternatives; at least one for every part, all finite.
        losses: Of the same shape.
        budget: Of the sum of costs.

    Returns:
        The number of the alternative of each part.

    Raises:
        ValueError: Even the cheapest alternatives cost more.
    """
    least = [min(each) for each in costs]
    spare = budget - sum(least)
    if spare < 0:
        raise ValueError(f"the cheapest choice costs {sum(least):g}, and the budget is {budget:g}")
    extra = [np.asarray(each, np.float64) - low for each, low in zip(costs, least, strict=True)]
    spare = min(spare, sum(float(each.max()) for each in extra))
    step = _step(extra, spare)
    steps = [np.ceil(each / step - 1e-9).astype(np.int64) for each in extra]
    picks = _fewest_losses(steps, [np.asarray(each, np.float64) for each in losses], int(spare / step + 1e-9))
    return _spent(picks, extra, losses, spare)


def _step(extra: Sequence[np.ndarray], spare: float) -> float:
    """What costs are counted in: their common divisor where that is coarse enough, else a share of the budget."""
    values = np.concatenate([np.zeros(1), *extra])
    fine = spare / _STEPS
    if (values == np.floor(values)).all() and (divisor := int(np.gcd.reduce(values.astype(np.int64)))) >= fine:
        return float(divisor) or 1.0
    return fine or 1.0


def _fewest_losses(steps: Sequence[np.ndarray], losses: Sequence[np.ndarray], spare: int) -> list[int]:
    """The alternatives with the smallest sum of ``losses`` whose ``steps`` sum up to ``spare`` at most."""
    best = np.zeros(spare + 1)  # by what may be spent, over the parts so far
    chosen = np.zeros((len(steps), spare + 1), np.int16)
    for part, (cost, loss) in enumerate(zip(steps, losses, strict=True)):
        following = np.full(spare + 1, np.inf)
        for number in range(len(cost)):
            if cost[number] > spare:
                continue
            found = best[: spare + 1 - cost[number]] + loss[number]
            better = found < following[cost[number] :]
            following[cost[number] :][better] = found[better]
            chosen[part, cost[number] :][better] = number
        best = following
    picks = []
    for part in reversed(range(len(steps))):
        picks.append(int(chosen[part, spare]))
        spare -= int(steps[part][picks[-1]])
    return picks[::-1]


def _spent(
    picks: list[int], extra: Sequence[np.ndarray], losses: Sequence[Sequence[float]], spare: float
) -> tuple[int, ...]:
    """``picks`` with what is left of ``spare`` spent on changes of single parts, the largest gain first."""
    left = spare - sum(float(each[pick]) for each, pick in zip(extra, picks, strict=True))
    while True:
        changes = [
            (losses[part][pick] - losses[part][other], part, other)
            for part, pick in enumerate(picks)
            for other in range(len(extra[part]))
            if losses[part][other] < losses[part][pick] and extra[part][other] - extra[part][pick] <= left
        ]
        if not changes:
            return tuple(picks)
        _, part, other = max(changes)
        left -= float(extra[part][other] - extra[part][picks[part]])
        picks[part] = other
