"""The choice of one alternative a part within a budget, against trying all of them."""

from itertools import product

import numpy as np
import pytest

from llmopt.passes._knapsack import choose


def all_choices(costs, losses, budget):
    """The smallest loss of any choice within the budget."""
    found = []
    for picks in product(*(range(len(each)) for each in costs)):
        if sum(costs[part][pick] for part, pick in enumerate(picks)) <= budget:
            found.append(sum(losses[part][pick] for part, pick in enumerate(picks)))
    return min(found)


def totals(picks, values):
    return sum(each[pick] for each, pick in zip(values, picks, strict=True))


@pytest.mark.parametrize("seed", range(30))
def test_integer_costs_give_the_best_of_all_choices(seed) -> None:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 5, 6)
    costs = [(random.integers(1, 30, size) * 7).tolist() for size in sizes]
    losses = [random.random(size).tolist() for size in sizes]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    budget = int(random.integers(least, most + 1))
    picks = choose(costs, losses, budget)
    assert totals(picks, costs) <= budget
    assert totals(picks, losses) == pytest.approx(all_choices(costs, losses, budget), abs=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_fractional_costs_stay_within_the_budget_and_near_the_best(seed) -> None:
    random = np.random.default_rng(seed)
    costs = [random.random(3).tolist() for _ in range(7)]
    losses = [(1 - np.asarray(each) + 0.3 * random.random(3)).tolist() for each in costs]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    budget = least + random.random() * (most - least)
    picks = choose(costs, losses, budget)
    assert totals(picks, costs) <= budget + 1e-12
    # Seven parts, each rounded up by a step at most: what a budget of 7 steps less allows is allowed here.
    assert totals(picks, losses) <= all_choices(costs, losses, budget - 7 * (budget - least) / 20_000) + 1e-12


def test_a_budget_that_allows_everything_gives_every_smallest_loss() -> None:
    assert choose([[1, 2, 3], [5, 9]], [[3, 1, 2], [1, 0]], 1e9) == (1, 1)


def test_the_smallest_budget_gives_the_cheapest_choice() -> None:
    assert choose([[1, 2], [5, 9]], [[3, 1], [1, 0]], 6) == (0, 0)


def test_of_equally_cheap_alternatives_the_better_one_is_taken() -> None:
    assert choose([[1, 1], [5, 5]], [[3, 1], [0, 1]], 6) == (1, 0)


def test_a_budget_below_the_cheapest_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="the cheapest choice costs 6"):
        choose([[1, 2], [5, 9]], [[3, 1], [1, 0]], 5)


def test_many_parts_with_huge_costs_are_chosen_within_the_budget() -> None:
    random = np.random.default_rng(0)
    costs = [[size * bits for bits in (4, 4.25, 8)] for size in random.integers(10**6, 10**8, 600)]
    losses = [sorted(random.random(3).tolist(), reverse=True) for _ in costs]
    budget = sum(each[0] for each in costs) * 1.2
    picks = choose(costs, losses, budget)
    assert 0.999 * budget < totals(picks, costs) <= budget
