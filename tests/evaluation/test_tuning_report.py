"""The page of a search: its plots, its table, and searches without anything to draw."""

import re
from pathlib import Path

from llmopt.evaluation.tuning import Search, Trial
from llmopt.evaluation.tuning_report import tuning_page
from llmopt.optimizer.tuning import Tuning

DAMPING = "passes.0.gptq.damping"
TUNING = Tuning.model_validate({"search": {DAMPING: [1, 2, 3, 4]}, "constraint": {"metric": "kl", "max": 0.1}})
TRIALS = [
    Trial(0, {DAMPING: 1}, "accepted", 100_000_000, 0.05, 40.0),
    Trial(1, {DAMPING: 2}, "accepted", 140_000_000, 0.01, 30.0),
    Trial(2, {DAMPING: 3}, "accepted", 150_000_000, 0.02, 20.0),
    Trial(3, {DAMPING: 4}, "rejected", 90_000_000, 0.15, 50.0, 0.5, "kl 0.15"),
    Trial(4, {DAMPING: 5}, "failed", message="a <bad> value"),
]


def page_of(trials: list[Trial], tuning: Tuning = TUNING) -> str:
    return tuning_page(Search(Path("it.yaml"), (), tuning, Path("out"), Path("cache")), trials)


def test_every_built_trial_is_a_point_of_both_plots_in_the_colour_of_its_kind() -> None:
    page = page_of(TRIALS)
    plots = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    assert len(plots) == 2
    for plot in plots:
        colours = re.findall(r'<circle class="(c\d)"[^>]*><title>trial (\d)', plot)
        assert colours == [("c4", "0"), ("c0", "1"), ("c8", "2"), ("c2", "3")]
        assert plot.count("the constraint") == 1
    xs = [float(x) for x in re.findall(r'cx="([\d.]+)"', plots[0])]
    assert sorted(range(4), key=xs.__getitem__) == [3, 0, 1, 2]


def test_the_page_loads_nothing_and_escapes_what_it_shows() -> None:
    page = page_of(TRIALS)
    assert "a &lt;bad&gt; value" in page
    assert not re.search(r"(src|href)=|url\(", page)


def test_a_search_in_which_nothing_was_built_has_a_table_only() -> None:
    page = page_of(TRIALS[4:])
    assert "<svg" not in page
    assert "of the trials met every limit" in page


def test_losses_that_are_not_finite_or_zero_are_no_obstacle() -> None:
    trials = [Trial(0, {DAMPING: 1}, "rejected", 1, float("nan"), 1.0), Trial(1, {DAMPING: 2}, "accepted", 1, 0.0, 1.0)]
    assert page_of(trials).count("<circle") == 2
