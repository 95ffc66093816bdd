"""Agreement token by token, against sums and formulas written out here."""

import math

import pytest
import torch

from llmopt.calibration.reference import Reference
from llmopt.evaluation.distance import Distance
from llmopt.evaluation.paired import Agreement, Yardstick, model_logits
from llmopt.optimizer.model import DenseWeight, Model
from llmopt.optimizer.tokens import Tokens


@pytest.fixture
def disturbed(tiny_model: Model) -> Model:
    """The model with another last norm."""
    return tiny_model.with_weights({"model.norm.weight": DenseWeight.of(torch.linspace(0.5, 1.5, 64))})


def agreement_of(*windows: list[float]) -> Agreement:
    kl = torch.tensor(windows, dtype=torch.float64)
    return Agreement(kl, kl < 0.5)


def test_the_mean_over_tokens_is_what_a_build_measures(tiny_model: Model, disturbed: Model, text: Tokens) -> None:
    found = Yardstick(tiny_model, text.ids).compare(model_logits(disturbed, text.ids))
    distance = Distance()
    for ids in text.ids:
        source, other = (Reference(model).logits(ids[None])[0] for model in (tiny_model, disturbed))
        distance.add(source, other, ids[1:])
    assert found.mean_kl == pytest.approx(distance.mean_kl, rel=1e-5)  # float32 logits of other batches
    assert found.top1 == distance.top1
    assert found.mean_kl > 0.001
    assert found.kl.shape == text.ids.shape


def test_the_source_model_agrees_with_itself(tiny_model: Model, text: Tokens) -> None:
    found = Yardstick(tiny_model, text.ids).compare(model_logits(tiny_model, text.ids))
    assert (found.mean_kl, found.top1) == (pytest.approx(0, abs=1e-9), 1.0)
    perfect = Agreement.perfect(text.ids.shape)
    assert (perfect.mean_kl, perfect.top1) == (0.0, 1.0)


def test_blocks_of_windows_may_have_any_size(tiny_model: Model, disturbed: Model, text: Tokens) -> None:
    single = list(model_logits(disturbed, text.ids))
    assert [tuple(block.shape) for block in single] == [(1, 41, 512)] * 3
    yardstick = Yardstick(tiny_model, text.ids)
    one_by_one, in_two = yardstick.compare(single), yardstick.compare([torch.cat(single[:2]), single[2]])
    assert torch.equal(one_by_one.kl, in_two.kl)


def test_windows_are_compared_in_the_order_of_their_text(tiny_model: Model, text: Tokens) -> None:
    blocks = list(model_logits(tiny_model, text.ids))
    assert Yardstick(tiny_model, text.ids).compare(reversed(blocks)).mean_kl > 0.01


def test_the_error_of_a_change_is_the_scatter_of_its_windows() -> None:
    before = agreement_of([0.1, 0.3], [0.2, 0.2], [0.9, 0.1])
    after = agreement_of([0.2, 0.4], [0.2, 0.6], [0.9, 0.3])
    change, error = after.change_from(before)
    means = [0.1, 0.2, 0.1]
    middle = sum(means) / 3
    deviation = math.sqrt(sum((each - middle) ** 2 for each in means) / 2)
    assert change == pytest.approx(middle)
    assert error == pytest.approx(deviation / math.sqrt(3))


def test_one_window_gives_no_error() -> None:
    assert agreement_of([0.2, 0.4]).change_from(agreement_of([0.1, 0.1])) == (pytest.approx(0.2), None)


def test_few_changes_without_a_cause_are_beyond_three_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    beyond = {2: 0, 3: 0}
    for _ in range(2000):
        before, after = (Agreement(torch.randn(16, 8, generator=generator).double(), torch.ones(1)) for _ in "ab")
        change, error = after.change_from(before)
        beyond = {factor: count + (abs(change) > factor * error) for factor, count in beyond.items()}
    # Student's t with 15 degrees of freedom: 6.4 % and 0.90 %, that is 128 and 18, with deviations of 11 and 4.
    assert 95 <= beyond[2] <= 161
    assert 6 <= beyond[3] <= 30


def test_windows_that_are_missing_are_noticed(tiny_model: Model, text: Tokens) -> None:
    with pytest.raises(AssertionError, match="every window"):
        Yardstick(tiny_model, text.ids).compare(list(model_logits(tiny_model, text.ids))[:2])
