"""Layers and sizes of a model as a manifest has them."""

from pathlib import Path

import pytest

from llmopt.optimizer.contents import layers_of, sizes_of
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.manifest import PassRecord
from llmopt.optimizer.model import Model
from llmopt.optimizer.sources import load_model
from llmopt.passes.round_to_nearest import RoundToNearest


@pytest.fixture
def quantized(tiny_llama: Path, tmp_path: Path) -> Model:
    """Int8 linears with layer 1's down_proj in float, the tied table in int8."""
    step = RoundToNearest.model_validate(
        {"scheme": "W8A8", "overrides": [{"match": "model.layers.1.mlp.down_proj", "scheme": "none"}]}
    )
    return step.run(load_model(str(tiny_llama), cache=tmp_path), PassContext())


def test_sizes_are_by_part_and_scheme(quantized: Model) -> None:
    rows = 64 + 32 + 32 + 64
    assert sizes_of(quantized) == {
        "embedding and head": {"W8A8": 512 * (64 + 4)},
        "attention": {"W8A8": 3 * rows * (64 + 4)},
        "mlp": {"W8A8": 3 * 2 * 128 * (64 + 4) + 2 * 64 * (128 + 4), "float32": 64 * 128 * 4},
        "other": {"float32": (3 * 2 + 1) * 64 * 4},
    }


def test_every_weight_is_counted_once(quantized: Model, tiny_llama_untied: Path, tmp_path: Path) -> None:
    for model in (quantized, load_model(str(tiny_llama_untied), cache=tmp_path)):
        counted = sum(count for found in sizes_of(model).values() for count in found.values())
        assert counted == sum(weight.nbytes for weight in model.weights.values())


def test_a_head_with_a_table_of_its_own_is_a_part_of_its_own(tiny_llama_untied: Path, tmp_path: Path) -> None:
    sizes = sizes_of(load_model(str(tiny_llama_untied), cache=tmp_path))
    assert list(sizes) == ["embedding", "attention", "mlp", "head", "other"]
    assert sizes["embedding"] == sizes["head"] == {"float32": 512 * 64 * 4}


def test_layers_have_the_error_that_a_pass_recorded(quantized: Model) -> None:
    record = PassRecord(name="it", changed=True, details={"errors": {"model.layers.2.self_attn.k_proj": 0.25}})
    layers = {layer.name: layer for layer in layers_of(quantized, [record])}
    assert list(layers) == quantized.linears()
    found = layers["model.layers.2.self_attn.k_proj"]
    assert (found.shape, found.scheme, found.bytes, found.error) == ([32, 64], "W8A8", 32 * (64 + 4), 0.25)
    assert layers["model.layers.1.mlp.down_proj"].scheme == "float32"
    assert layers["lm_head"].error is None
