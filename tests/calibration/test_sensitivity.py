"""Sensitivities against whole models in which one part is rounded, and what is found again."""

import json
from pathlib import Path

import pytest
import torch

from llmopt.calibration import sensitivity
from llmopt.calibration.divergence import kl_divergence
from llmopt.calibration.input_maxima import input_maxima
from llmopt.calibration.reference import Reference
from llmopt.calibration.sensitivity import Part, sensitivities, shortened
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import DenseWeight
from llmopt.optimizer.scheme import PRESETS
from llmopt.optimizer.tokens import Tokens
from llmopt.optimizer.weight_rounding import round_weight

W4, W8, W8A8 = PRESETS["W4A16"].with_group_size(16), PRESETS["W8A16"], PRESETS["W8A8"]
STATIC, FP8 = PRESETS["W8A8_STATIC"], PRESETS["FP8"]
IDS = torch.randint(3, 101, (5, 12), generator=torch.Generator().manual_seed(0))
TEXT = (IDS, torch.ones_like(IDS, dtype=torch.bool))


@pytest.fixture
def model(pair_of):
    return pair_of()[0]


def reading(ids):
    return PassContext(calibration=lambda: Tokens("it", ids, ""))


def parts_of(model, schemes=(W4, W8)):
    return [
        Part(layer, tuple(name for readers in stage for name in readers), schemes)
        for layer, each in enumerate(model.decoder.layers)
        for stage in each.stages
    ]


def whole(model, part, scheme, mask=TEXT[1], maxima=None):
    """The same from two whole models."""
    changed = {}
    for module in part.modules:
        name = model.weight_of(module)
        largest = None if maxima is None else torch.tensor(maxima[module])
        changed[name], _ = round_weight(name, model.weights[name], scheme, largest)
    rounded = model.with_weights(changed)
    logits = [Reference(each).logits(IDS)[mask] for each in (model, rounded)]
    return float(kl_divergence(*logits).mean())


def test_each_is_what_the_whole_model_loses(model) -> None:
    parts = parts_of(model, (W4, W8, W8A8))
    found = sensitivities(model, parts, TEXT)
    expected = [[whole(model, part, scheme) for scheme in part.schemes] for part in parts]
    # Only the order of float32 sums may differ, of logits that are about 1.
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-7)
    assert all(four > eight for four, eight, _ in found)


def test_inputs_are_rounded_on_the_scale_that_will_be_stored(model) -> None:
    parts = parts_of(model, (STATIC, FP8))
    seen = input_maxima(model, model.linears(), reading(IDS))
    larger = {module: 3 * value for module, value in seen.items()}
    found = sensitivities(model, parts, TEXT, maxima=larger)
    expected = [[whole(model, part, scheme, maxima=larger) for scheme in part.schemes] for part in parts]
    # An input on the border of two integers may round either way when the batch is another; a few of them do.
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-2, atol=1e-7)
    tight = sensitivities(model, parts, TEXT, maxima=seen)
    assert all(wide[0] > narrow[0] for wide, narrow in zip(found, tight, strict=True))


def test_what_stays_in_float_loses_nothing_and_is_not_computed(model, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sensitivities(model, parts_of(model, (W4, None)), TEXT)
    assert all(rounded > 0 and kept == 0 for rounded, kept in found)
    monkeypatch.setattr(sensitivity, "_Run", None)
    assert sensitivities(model, parts_of(model, (None,)), TEXT) == [[0.0]] * 12


def test_other_scales_of_inputs_are_measured_again(model, tmp_path: Path) -> None:
    parts = parts_of(model, (STATIC, W8))
    seen = input_maxima(model, model.linears(), reading(IDS))
    sensitivities(model, parts, TEXT, maxima=seen, directory=tmp_path)
    larger = {module: 3 * value for module, value in seen.items()}
    again = sensitivities(model, parts, TEXT, maxima=larger, directory=tmp_path)
    assert again == sensitivities(model, parts, TEXT, maxima=larger)
    assert len(json.loads((tmp_path / "layer-00000.json").read_text())) == 4 * 3


def test_padding_does_not_count(model) -> None:
    mask = torch.arange(12) < torch.tensor([[12], [3], [7], [12], [1]])
    part = parts_of(model)[5]
    found = sensitivities(model, [part], (IDS, mask))
    assert found[0][0] == pytest.approx(whole(model, part, W4, mask), rel=1e-3)


def test_what_was_measured_is_not_measured_again(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(model)
    first = sensitivities(model, parts, TEXT, directory=tmp_path)
    monkeypatch.setattr(sensitivity, "_Run", None)
    assert sensitivities(model, parts, TEXT, directory=tmp_path) == first


def test_a_killed_measurement_goes_on_at_its_layer(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(model)
    expected = sensitivities(model, parts, TEXT)
    measured: list[int] = []
    honest = sensitivity._Run.changes

    def counting(run, rounded):
        if rounded and len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(len(rounded))
        return honest(run, rounded)

    monkeypatch.setattr(sensitivity._Run, "changes", counting)
    with pytest.raises(KeyboardInterrupt):
        sensitivities(model, parts, TEXT, directory=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layer-00000.json", "layer-00001.json"]
    assert len(json.loads((tmp_path / "layer-00001.json").read_text())) == 8
    monkeypatch.setattr(
        sensitivity._Run, "changes", lambda run, rounded: measured.append(len(rounded)) or honest(run, rounded)
    )
    assert sensitivities(model, parts, TEXT, directory=tmp_path) == expected
    assert measured == [8, 8, 0, 0, 8]


def test_builds_that_measure_a_layer_at_the_same_time_keep_both_results(tmp_path: Path) -> None:
    for found in ({"W4A16": 0.5}, {"W8A16": 0.25}):
        sensitivity._keep(tmp_path, 3, found)
    assert sensitivity._kept(tmp_path, 3) == {"W4A16": 0.5, "W8A16": 0.25}


def test_another_scheme_is_measured_beside_those_that_are_known(model, tmp_path: Path) -> None:
    sensitivities(model, parts_of(model, (W4,)), TEXT, directory=tmp_path)
    both = sensitivities(model, parts_of(model), TEXT, directory=tmp_path)
    assert both == sensitivities(model, parts_of(model), TEXT)


def test_experts_are_rounded_together(family_of, tmp_path: Path) -> None:
    from llmopt.optimizer.sources import load_model

    model = load_model(str(family_of("mixtral")), cache=tmp_path)
    parts = parts_of(model)
    found = sensitivities(model, parts[2:4], TEXT)
    assert [each[0] for each in found] == pytest.approx([whole(model, part, W4) for part in parts[2:4]], rel=1e-3)


def test_predictions_that_are_not_finite_are_named(model) -> None:
    name = "model.layers.1.post_attention_layernorm.weight"
    damaged = model.with_weights({name: DenseWeight.of(model.weights[name].load() * torch.inf)})
    with pytest.raises(PassError, match="not finite when linears of layer 0 are rounded"):
        sensitivities(damaged, parts_of(model), TEXT)


def test_a_text_is_cut_to_short_windows() -> None:
    tokens = Tokens(name="it", ids=torch.arange(8 * 1024).reshape(8, 1024), digest="0")
    ids, mask = shortened(tokens, 1000)
    assert ids.shape == mask.shape == (4, 256)
    assert ids[1, 0] == 1024
    assert shortened(tokens, 10)[0].shape == (1, 256)
    assert shortened(tokens, 10**6)[0].shape == (8, 256)


def test_padding_of_a_text_is_told() -> None:
    tokens = Tokens(name="it", ids=torch.zeros(2, 20, dtype=torch.int64), digest="0", lengths=torch.tensor([20, 4]))
    assert shortened(tokens, 100)[1].sum(1).tolist() == [20, 4]
