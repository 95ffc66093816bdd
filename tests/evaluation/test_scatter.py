"""Scatter plots: axes that hold their values, and points where their values are."""

import pytest

from llmopt.evaluation.scatter import Mark, axis_of, scatter


@pytest.mark.parametrize("values", [[1, 2, 3], [5], [0, 0], [0.0], [99.5, 100], [1e-4, 2], [-3, 4], [1e9, 1.5e9]])
def test_every_value_is_on_its_axis_and_so_are_the_ticks(values: list[float]) -> None:
    axis = axis_of(values, "it", str)
    assert all(0 <= axis.share(each) <= 1 for each in values)
    # A millionth of the length: ticks are multiples of a step in floating point.
    assert all(-1e-6 <= axis.share(each) <= 1 + 1e-6 for each in axis.ticks)
    assert 2 <= len(axis.ticks) <= 12


def test_values_far_apart_get_powers_of_ten() -> None:
    axis = axis_of([0.002, 0.5], "it", str)
    assert axis.is_log
    assert axis.ticks == pytest.approx((0.001, 0.01, 0.1, 1))
    assert axis.share(0.01) == pytest.approx(1 / 3)


def test_larger_values_are_further_right_and_up() -> None:
    x, y = axis_of([1, 3], "x", str), axis_of([10, 30], "y", str)
    plot = scatter(x, y, [(each, 10 * each, Mark("c0", str(each), "")) for each in (1, 2, 3)], limit=20)
    (ax, ay, _), (bx, by, _), (cx, cy, what) = plot.points
    assert ax < bx < cx <= plot.right
    assert ay > by > cy >= plot.top
    assert bx == pytest.approx((ax + cx) / 2, abs=0.1)  # positions are rounded to tenths
    assert plot.limit == by
    assert what.label == "3"


def test_a_limit_outside_of_the_plot_is_not_drawn() -> None:
    axis = axis_of([1, 3], "it", str)
    assert scatter(axis, axis, [], limit=30).limit is None
