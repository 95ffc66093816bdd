"""What is written as a checkpoint and read as a model has the same integers, scales and zero points."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmopt.exporters.checkpoint.exporter import Checkpoint
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.model import Model, QuantTensors, QuantWeight
from llmopt.optimizer.scheme import PRESETS
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens
from llmopt.passes.round_to_nearest import RoundToNearest

IDS = torch.randint(3, 500, (2, 16), generator=torch.Generator().manual_seed(0))
G16 = {"group_size": 16, "head": "none"}
MODULE = "model.layers.1.mlp.down_proj"


@pytest.fixture
def model(llama_of, tmp_path: Path) -> Model:
    """128 wide, so that blocks of 128 fit."""
    path = llama_of(hidden_size=128, intermediate_size=256, head_dim=64, tie_word_embeddings=False)
    return load_model(str(path), cache=tmp_path)


def in_16_bits(model: Model) -> Model:
    """Scales that float16 holds: formats store nothing finer."""
    changed = {}
    for name, weight in model.weights.items():
        if isinstance(weight, QuantWeight):
            tensors = weight.load()
            changed[name] = QuantWeight.of(tensors._replace(scale=tensors.scale.half().float()), weight.scheme)
    return model.with_weights(changed)


def quantized(model: Model, **options: Any) -> Model:
    tokens = Tokens(name="it", ids=IDS, digest="0")
    return in_16_bits(RoundToNearest(**options).run(model, PassContext(calibration=lambda: tokens)))


def written(model: Model, directory: Path, **options: Any) -> Path:
    Checkpoint(**options).export(model, directory, PassContext())
    return directory / "checkpoint"


def assert_same(found: Model, expected: Model) -> None:
    for module in expected.linears():
        ours, theirs = found.weights[f"{module}.weight"], expected.weights[f"{module}.weight"]
        assert isinstance(ours, QuantWeight) is isinstance(theirs, QuantWeight), module
        if isinstance(ours, QuantWeight) and isinstance(theirs, QuantWeight):
            assert ours.scheme == theirs.scheme
            for part, other in zip(ours.load(), theirs.load(), strict=True):
                assert torch.equal(part, other) if torch.is_tensor(part) else part == other


@pytest.mark.parametrize(
    ("form", "options"),
    [
        *(("compressed-tensors", {"scheme": name, **G16}) for name in ("W4A16", "W4A16_ASYM", "W3A16", "W2A16")),
        *(("compressed-tensors", {"scheme": name}) for name in ("W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK")),
        ("compressed-tensors", {"scheme": "W4A16", **G16, "overrides": [{"match": MODULE, "scheme": "W8A16"}]}),
        *(("gptq", {"scheme": name, **G16}) for name in ("W4A16", "W3A16", "W2A16", "W8A16")),
        ("gptq", {"scheme": "W8A16"}),
        ("gptq", {"scheme": "W4A16", **G16, "overrides": [{"match": MODULE, "scheme": "W8A16"}]}),
        ("gptq", {"scheme": "W4A16", **G16, "overrides": [{"match": MODULE, "scheme": "none"}]}),
        ("gptq_v2", {"scheme": "W4A16", **G16}),
        ("gptq_v2", {"scheme": "W4A16_ASYM", **G16}),
        ("awq", {"scheme": "W4A16_ASYM", **G16}),
        ("fp8", {"scheme": "FP8_BLOCK"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(str(each) for each in value.values()),
)
def test_numbers_come_back_as_they_went(form: Any, options: dict[str, Any], model, tmp_path: Path) -> None:
    made = quantized(model, **options)
    directory = written(made, tmp_path / "out", format=form)
    assert_same(load_model(str(directory), cache=tmp_path), made)


def test_symmetric_integers_have_zero_points_in_awq(model, tmp_path: Path) -> None:
    made = quantized(model, scheme="W4A16", **G16)
    found = load_model(str(written(made, tmp_path / "out", format="awq")), cache=tmp_path)
    ours, theirs = found.weights[f"{MODULE}.weight"], made.weights[f"{MODULE}.weight"]
    assert isinstance(ours, QuantWeight)
    assert not ours.scheme.weights.symmetric
    assert not bool(ours.load().zero.any())
    assert torch.equal(ours.dense(), theirs.dense())


def test_gptq_to_compressed_tensors_and_back_is_the_same_file(model, tmp_path: Path) -> None:
    made = quantized(model, scheme="W4A16", **G16)
    first = written(made, tmp_path / "first", format="gptq")
    between = written(load_model(str(first), cache=tmp_path), tmp_path / "between", format="compressed-tensors")
    last = written(load_model(str(between), cache=tmp_path), tmp_path / "last", format="gptq")
    assert (first / "model.safetensors").read_bytes() == (last / "model.safetensors").read_bytes()
    configs = [json.loads((each / "config.json").read_text()) for each in (first, last)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def ordered(model: Model) -> Model:
    """Each linear's columns quantized in an order of its own input, as GPTQ with desc_act does."""
    changed: dict[str, QuantWeight] = {}
    for module in model.linears():
        weight = model.weights[f"{module}.weight"]
        if not isinstance(weight, QuantWeight):
            continue
        columns = weight.shape[1]
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
        index = torch.empty(columns, dtype=torch.int32).scatter_(
            0, order, torch.arange(columns, dtype=torch.int32) // 16
        )
        changed[f"{module}.weight"] = QuantWeight.of(weight.load()._replace(group_index=index), weight.scheme)
    return model.with_weights(changed)


def test_the_order_of_activations_comes_back_from_gptq(model, tmp_path: Path) -> None:
    made = ordered(quantized(model, scheme="W4A16", **G16))
    directory = written(made, tmp_path / "out", format="gptq")
    assert json.loads((directory / "config.json").read_text())["quantization_config"]["desc_act"] is True
    found = load_model(str(directory), cache=tmp_path)
    assert_same(found, made)
    for form in ("compressed-tensors", "awq"):
        with pytest.raises(UnsupportedError, match="desc_act"):
            written(found, tmp_path / form, format=form)


def test_float_linears_are_named_in_the_config(model, tmp_path: Path) -> None:
    made = quantized(model, scheme="W4A16", **G16, overrides=[{"match": MODULE, "scheme": "none"}])
    configs = {}
    for form in ("gptq", "awq"):
        directory = written(made, tmp_path / form, format=form)
        configs[form] = json.loads((directory / "config.json").read_text())["quantization_config"]
        assert load_file(directory / "model.safetensors")[f"{MODULE}.weight"].dtype == torch.float32
    assert list(configs["gptq"]["dynamic"]) == [r"-:^model\.layers\.1\.mlp\.down_proj$"]
    assert configs["gptq"]["lm_head"] is False
    assert configs["awq"]["modules_to_not_convert"] == [MODULE, "lm_head"]
    assert json.loads((tmp_path / "gptq/checkpoint/quantize_config.json").read_text()) == configs["gptq"]


@pytest.mark.parametrize(
    ("form", "scheme", "shape", "reason"),
    [
        ("gptq", "W8A8", None, "leave inputs in float"),
        ("gptq", "FP8", None, "integers"),
        ("gptq", "W4A16_ASYM", None, "gptq_v2"),
        ("gptq", "W3A16", (64, 48), "64x48"),
        ("gptq_v2", "W4A16_ASYM", (64, 64), None),
        ("awq", "W8A16", None, "head: none"),
        ("awq", "W4A16", (12, 64), "packs rows by 8"),
        ("awq", "W4A16", (16, 64), None),
        ("fp8", "FP8_DYNAMIC", None, "compressed-tensors"),
        ("fp8", "FP8_BLOCK", (128, 192), "128x192"),
        ("fp8", "FP8_BLOCK", (128, 256), None),
    ],
)
def test_what_a_format_cannot_hold_is_refused(form: Any, scheme: str, shape, reason: str | None) -> None:
    refusal = Checkpoint(format=form).refusal(PRESETS[scheme], shape=shape)
    assert (refusal is None) == (reason is None)
    assert reason is None or reason in str(refusal)


def test_awq_has_one_group_size(model, tmp_path: Path) -> None:
    other = {"match": MODULE, "scheme": PRESETS["W4A16"].with_group_size(32)}
    made = quantized(model, scheme="W4A16", **G16, overrides=[other])
    with pytest.raises(UnsupportedError, match="one group size, not 16 and 32"):
        written(made, tmp_path / "out", format="awq")
    assert not (tmp_path / "out").exists()


def test_known_words_of_gptq(tmp_path: Path, model) -> None:
    """The format's own examples: 0..15 along the columns, and zero points of 8 as 7 and as 8."""
    values = (torch.arange(16, dtype=torch.int8) - 8).repeat(8, 8)
    weight = QuantWeight.of(QuantTensors(values, torch.ones(8, 1), None), PRESETS["W4A16"].with_group_size(-1))
    for form, zero in (("gptq", 0x77777777), ("gptq_v2", 0x88888888 - (1 << 32))):
        directory = written(model.with_weights({f"{MODULE}.weight": weight}), tmp_path / form, format=form)
        tensors = load_file(directory / "model.safetensors")
        assert [word & 0xFFFFFFFF for word in tensors[f"{MODULE}.qweight"][:2, 0].tolist()] == [0x76543210, 0xFEDCBA98]
        assert tensors[f"{MODULE}.qzeros"].tolist() == [[zero]]
