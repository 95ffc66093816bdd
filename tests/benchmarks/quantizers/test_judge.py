from pathlib import Path

import pytest
import torch

from llmopt.benchmarks.quantizers.judge import (
    Judge,
    Theirs,
    size_of,
    with_our_weights,
    with_rounded_tables,
    with_their_weights,
)
from llmopt.benchmarks.quantizers.run_passes import quantized, recipe_of
from llmopt.optimizer.model import DenseWeight, Model, QuantWeight
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.weight_store import WeightStore

IDS = torch.arange(48).reshape(2, 24)
W4 = {"scheme": "W4A16", "group_size": 32, "head": "none"}


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Model:
    return load_model(str(tiny_llama), cache=tmp_path / "cache")


def rounded(model: Model, cache: Path, **options: object) -> Model:
    recipe = recipe_of(model.source.spec, [{"round_to_nearest": W4 | options}], threads=1)
    return quantized(model, recipe, cache=cache)


def test_the_float_model_loses_nothing_and_a_rounded_one_something(model: Model, tmp_path: Path) -> None:
    judge = Judge(model, IDS, threads=1)
    itself, other = judge.figures(model), judge.figures(rounded(model, tmp_path))
    assert (itself.kl, itself.top1, itself.increase) == (0, 1, 0)
    assert other.kl > 1e-4
    assert other.source_perplexity == itself.perplexity != other.perplexity


def test_the_windows_are_predicted_by_the_tokens_before_them_only(model: Model) -> None:
    from llmopt.calibration.reference import Reference

    logits = Reference(model).logits(IDS)[:, :-1].reshape(-1, 512)
    expected = torch.nn.functional.cross_entropy(logits, IDS[:, 1:].reshape(-1)).exp()
    assert Judge(model, IDS, threads=1).figures(model).perplexity == pytest.approx(float(expected), rel=1e-5)


def test_four_bits_in_groups_of_32_take_four_and_a_half(model: Model, tmp_path: Path) -> None:
    size = size_of(rounded(model, tmp_path))
    assert size.weights == 3 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    assert size.bits_per_weight == 4.5
    assert size_of(model).bits_per_weight == 16


def test_sizes_of_packed_weights_are_what_their_reader_counted(model: Model) -> None:
    linears = [module for module in model.linears() if module != model.arch.head]
    assert size_of(model, Theirs({}, dict.fromkeys(linears, 1000))).bits == 1000 * len(linears)


def test_embedding_and_head_of_another_program_do_not_count(model: Model) -> None:
    name, table = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
    shapes = {name: (128, 64), table: (512, 64), "unknown": (1,)}
    stored = {each: DenseWeight.of(torch.zeros(shape)) for each, shape in shapes.items()}
    theirs = with_their_weights(model, Theirs(stored))
    assert not theirs.weights[name].dense().any()
    assert theirs.weights[table] is model.weights[table]
    assert theirs.weights.keys() == model.weights.keys()


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_llama_untied"])
def test_tables_in_float_are_rounded_to_eight_bits(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = load_model(str(request.getfixturevalue(fixture)), cache=tmp_path)
    changed = {n for n, w in with_rounded_tables(model).weights.items() if w is not model.weights[n]}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"} & model.weights.keys()
    for name in changed:
        weight = with_rounded_tables(model).weights[name]
        assert isinstance(weight, QuantWeight)
        assert weight.scheme.name == "W8A16 g32"


def test_tables_that_are_quantized_stay(model: Model, tmp_path: Path) -> None:
    before = rounded(model, tmp_path, head="W8A16")
    assert (
        with_rounded_tables(before).weights["model.embed_tokens.weight"] is before.weights["model.embed_tokens.weight"]
    )


def test_scales_of_groups_are_judged_as_float16_holds_them(model: Model, tmp_path: Path) -> None:
    behind = rounded(model, tmp_path / "cache")
    (tmp_path / "left").mkdir()
    store = WeightStore(tmp_path / "left")
    name = "model.layers.0.mlp.up_proj.weight"
    store.keep({name: behind.weights[name], "model.norm.weight": DenseWeight.of(torch.full((64,), 1 / 3))})
    store.close()
    read = with_our_weights(model, tmp_path / "left")
    found, original = read.weights[name], behind.weights[name]
    assert isinstance(found, QuantWeight)
    assert isinstance(original, QuantWeight)
    assert torch.equal(found.load().scale, original.load().scale.half().float())
    assert torch.equal(found.load().values, original.load().values)
    assert torch.equal(read.weights["model.norm.weight"].dense(), torch.full((64,), 1 / 3))
