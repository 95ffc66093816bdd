"""What the demo of adapters says of its figures."""

import json
from pathlib import Path

from llmopt.benchmarks.adapters.tickets import held_out
from llmopt.benchmarks.adapters.variants import HELD_OUT, TRAINED_ON, Variant
from llmopt.benchmarks.lora_demo import missed, rows, write_texts
from llmopt.evaluation.distance import Distance
from llmopt.optimizer.tokenizer_config import chat_template

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


def test_its_texts_are_conversations_as_the_model_reads_them(tiny_llama: Path, tmp_path: Path) -> None:
    conversations = write_texts(tmp_path, tiny_llama)
    lines = (tmp_path / TRAINED_ON).read_text("utf-8").splitlines()
    assert [json.loads(each)["messages"] for each in lines] == conversations
    measured = (tmp_path / HELD_OUT).read_text("utf-8")
    assert measured.count("TICKET ") == len(held_out(60))
    template = chat_template(tiny_llama)
    assert template is not None
    assert measured.startswith(template.render(held_out(1)[0], add_generation_prompt=False))
