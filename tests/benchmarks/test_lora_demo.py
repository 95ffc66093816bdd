"""What the demo of adapters says of its figures."""

from llmopt.benchmarks.lora.variants import Variant
from llmopt.benchmarks.lora_demo import missed, rows
from llmopt.evaluation.distance import Distance

EXACT = Variant("a", "exact", "", max_difference=1e-3)
CLOSE = Variant("b", "close", "", max_increase=0.016)


def distance(*, largest: float = 0.0, engine_nll: float = 100.0) -> Distance:
    return Distance(
        positions=200, kl=2.0, agreements=190, targets=100, source_nll=100.0, engine_nll=engine_nll, largest=largest
    )


def test_a_row_has_the_increase_of_perplexity() -> None:
    assert rows([CLOSE], [distance(largest=0.25, engine_nll=101.0)]) == [
        ["close", "2.5e-01", "2.718", "2.746", "+1.01%", "0.01000", "95.0%"]
    ]


def test_a_promise_that_is_missed_is_said() -> None:
    assert missed(EXACT, distance(largest=9e-4), "t") == []
    assert missed(EXACT, distance(largest=2e-3), "t") == ["exact on t: a logit differs by 2.0e-03"]
    assert missed(CLOSE, distance(largest=9.0, engine_nll=101.5), "t") == []
    assert missed(CLOSE, distance(engine_nll=102.0), "t") == ["close on t: perplexity is +2.02%"]
