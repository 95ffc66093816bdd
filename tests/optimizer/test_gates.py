"""Gates as they are written in a recipe: which limits go with which metric, and percentages."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from llmopt.optimizer.gates import Gate


@pytest.mark.parametrize(
    "written",
    [
        {"metric": "kl", "max": 0.02},
        {"metric": "kl", "max": 0},
        {"metric": "top1", "min": 0.9, "windows": 1, "tokens": 2},
        {"metric": "perplexity", "data": "a.txt", "max": 20},
        {"metric": "perplexity", "data": "a.txt", "max_increase": 0.03},
        {"metric": "kl", "max": 1, "data": "sub/a.txt"},
    ],
)
def test_a_gate_is_described_as_it_was_written(written: dict[str, object]) -> None:
    described = Gate.model_validate(written).describe()
    assert {**described, **written} == described
    assert set(described) == set(written) | {"windows", "tokens"}
    assert Gate.model_validate(described) == Gate.model_validate(written)


def test_a_gate_takes_a_fair_amount_of_text_when_none_is_given() -> None:
    gate = Gate(metric="kl", max=1)
    assert (gate.windows * gate.tokens, gate.data) == (2048, None)


@pytest.mark.parametrize(
    ("written", "value"), [("3%", 0.03), (" 0.5 %", 0.005), ("0%", 0.0), (0.03, 0.03), (2, 2.0), ("0.03", 0.03)]
)
def test_an_increase_is_a_fraction_or_a_percentage(written: object, value: float) -> None:
    gate = Gate.model_validate({"metric": "perplexity", "data": "a.txt", "max_increase": written})
    assert gate.max_increase == pytest.approx(value)
    assert gate.data == Path("a.txt")


@pytest.mark.parametrize("written", ["three%", "%", "-3%", "nan%", "inf%", "3 percent", -0.1])
def test_an_increase_that_is_no_percentage_is_refused(written: object) -> None:
    with pytest.raises(ValidationError):
        Gate.model_validate({"metric": "perplexity", "data": "a.txt", "max_increase": written})


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"metric": "kl"}, "metric kl takes exactly one of: max"),
        ({"metric": "kl", "min": 0.1}, "metric kl takes exactly one of: max"),
        ({"metric": "kl", "max_increase": "3%"}, "metric kl takes exactly one of: max"),
        ({"metric": "kl", "max": 1, "min": 0.1}, "metric kl takes exactly one of: max"),
        ({"metric": "top1", "max": 1}, "metric top1 takes exactly one of: min"),
        ({"metric": "perplexity", "data": "a", "max": 9, "max_increase": 0.1}, "exactly one of: max, max_increase"),
        ({"metric": "perplexity", "max": 9}, "perplexity needs data"),
        ({"metric": "accuracy", "min": 0.5}, "'kl', 'top1', 'perplexity', 'cosine' or 'min_cosine'"),
        ({"metric": "kl", "max": -1}, "greater than or equal to 0"),
        ({"metric": "kl", "max": float("nan")}, "finite number"),
        ({"metric": "top1", "min": 1.1}, "less than or equal to 1"),
        ({"metric": "kl", "max": 1, "windows": 0}, "greater than 0"),
        ({"metric": "kl", "max": 1, "tokens": 1}, "greater than or equal to 2"),
        ({"metric": "kl", "maximum": 1}, "Extra inputs"),
    ],
)
def test_what_no_build_could_be_judged_by_is_refused(written: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Gate.model_validate(written)
