"""Which texts gates ask for, and what they decide."""

import pytest

from llmopt.evaluation.gates import gates_of, judge, texts_for
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.gates import Gate
from llmopt.optimizer.manifest import Measurement
from llmopt.optimizer.tokens import SAMPLED

SIZE = {"windows": 8, "tokens": 1024}


def measured(metric, value, *, source=None, data=SAMPLED, tokens=8192):
    return Measurement(metric=metric, value=value, source=source, data=data, data_digest="d", tokens=tokens)


@pytest.mark.parametrize(
    ("gate", "value", "passed"),
    [
        ({"metric": "kl", "max": 0.02}, 0.02, True),
        ({"metric": "kl", "max": 0.02}, 0.0201, False),
        ({"metric": "kl", "max": 0.02}, float("nan"), False),
        ({"metric": "top1", "min": 0.9}, 0.9, True),
        ({"metric": "top1", "min": 0.9}, 0.899, False),
    ],
)
def test_a_gate_holds_up_to_its_limit(gate, value, passed):
    verdict = judge([Gate(**gate, **SIZE)], [measured(gate["metric"], value)])
    assert verdict.status == ("accepted" if passed else "rejected")
    assert verdict.gates[0].passed is passed
    assert verdict.gates[0].gate == gate | SIZE


@pytest.mark.parametrize(("value", "status"), [(20.59, "accepted"), (20.61, "rejected")])
def test_an_increase_is_relative_to_the_source(value, status):
    gate = Gate(metric="perplexity", data="a.txt", max_increase="3%", **SIZE)
    found = measured("perplexity", value, source=20.0, data="a.txt", tokens=8 * 1023)
    assert judge([gate], [found]).status == status


def test_one_missed_gate_rejects():
    gates = [Gate(metric="kl", max=0.1, **SIZE), Gate(metric="top1", min=0.9, **SIZE)]
    verdict = judge(gates, [measured("kl", 0.2), measured("top1", 0.95)])
    assert verdict.status == "rejected"
    assert [result.passed for result in verdict.gates] == [False, True]


def test_no_gates_no_judgement():
    assert judge([], [measured("kl", 9.0)]).status == "unjudged"


def test_a_gate_nobody_measured_is_an_error():
    with pytest.raises(InputError, match=r"kl on a\.txt was not measured"):
        judge([Gate(metric="kl", max=1, data="a.txt")], [measured("kl", 0.1)])


def test_a_gate_looks_at_its_own_text_and_size():
    gate = Gate(metric="kl", max=0.1, data="a.txt", windows=2, tokens=10)
    others = [measured("kl", 9.0), measured("kl", 9.0, data="a.txt"), measured("kl", 9.0, data="b.txt", tokens=20)]
    assert judge([gate], [*others, measured("kl", 0.05, data="a.txt", tokens=20)]).status == "accepted"


def test_the_worst_of_several_fitting_measurements_counts():
    assert judge([Gate(metric="kl", max=0.1, **SIZE)], [measured("kl", 0.05), measured("kl", 0.2)]).status == "rejected"


def test_gates_that_share_a_text_read_it_once(tiny_model, tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time there was a fox. " * 20)
    gates = [
        Gate(metric="kl", max=1, data="a.txt", windows=2, tokens=16),
        Gate(metric="perplexity", max=99, data="a.txt", windows=2, tokens=16),
        Gate(metric="kl", max=1, data="a.txt", windows=1, tokens=16),
        Gate(metric="top1", min=0, windows=2, tokens=8),
    ]
    texts = texts_for(gates, tiny_model, base=tmp_path)
    assert [(text.name, tuple(text.ids.shape)) for text in texts] == [
        ("a.txt", (2, 16)),
        ("a.txt", (1, 16)),
        (SAMPLED, (2, 8)),
    ]


def test_gates_come_back_out_of_a_resolved_recipe():
    gates = [Gate(metric="kl", max=0.5), Gate(metric="perplexity", data="a.txt", max_increase="3%")]
    assert gates_of({"accept": [gate.model_dump(mode="json") for gate in gates]}) == gates
    assert gates_of({}) == []
