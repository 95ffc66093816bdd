"""The int8 cache: its scales, that reference and engine round alike in every family, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from llmopt.calibration.reference import Reference
from llmopt.exporters.onnx.exporter import Onnx
from llmopt.optimizer import loader
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import PassError, UnsupportedError
from llmopt.optimizer.model import DenseWeight, Model
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens
from llmopt.passes.kv_cache import KvCache
from llmopt.passes.round_to_nearest import RoundToNearest
from llmopt.runtime.backends.onnxruntime import open_backend

IDS = np.random.default_rng(5).integers(3, 120, (3, 14))
TEXT = Tokens("some", torch.from_numpy(IDS), "")
CAPACITY = 32
TOLERANCE = 0.01
"""Of ``rms(difference) / std(logits)``, the median over rows: a number on the border of two integers may round the
other way, which moves what reads it by a hundredth of that number's channel."""


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Model:
    return load_model(str(tiny_llama), cache=tmp_path / "cache")


def quantized(model: Model, text: Tokens = TEXT, **options: str) -> Model:
    one = KvCache(**options)
    one.requires(model)
    return one.run(model, PassContext(calibration=lambda: text))


def logits(model: Model, ids: np.ndarray = IDS) -> np.ndarray:
    return Reference(model, threads=1).logits(torch.from_numpy(ids)).numpy()


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.median(np.sqrt(((found - expected) ** 2).mean(-1)) / expected.std(-1)))


def test_scales_cover_the_largest_keys_behind_rope_and_values(model: Model, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM, DynamicCache

    cache = DynamicCache()
    network = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        network(torch.from_numpy(IDS), past_key_values=cache)
    found = quantized(model)
    for index, layer in enumerate(model.decoder.layers):
        pair = cache.layers[index].keys, cache.layers[index].values
        for name, x in zip(layer.attention.cache_scales, pair, strict=True):
            assert name.startswith(f"{layer.name}.self_attn.")
            expected = x.abs().amax((0, 2)).flatten() / 127
            torch.testing.assert_close(found.weights[name].load(), expected, rtol=1e-4, atol=0)


def test_a_scale_for_all_is_that_of_the_largest_channel(model: Model) -> None:
    channel, tensor = (quantized(model, strategy=strategy) for strategy in ("channel", "tensor"))
    name = "model.layers.1.self_attn.v_scale"
    assert tensor.weights[name].load().tolist() == [channel.weights[name].load().max()]
    plain = logits(model)
    assert 0 < error(logits(channel), plain) < error(logits(tensor), plain) < 0.1


def test_padding_is_not_looked_at(model: Model) -> None:
    padded = Tokens("some", torch.from_numpy(IDS), "", lengths=torch.tensor([5, 5, 5]))
    short = Tokens("some", torch.from_numpy(IDS[:, :5]), "")
    name = "model.layers.2.self_attn.k_scale"
    found, expected = (quantized(model, text).weights[name].load() for text in (padded, short))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_activations_may_lie_in_a_file(model: Model, tmp_path: Path) -> None:
    limited = PassContext(calibration=lambda: TEXT, work=tmp_path / "work", activation_bytes=100)
    found, expected = KvCache().run(model, limited), quantized(model)
    assert list((tmp_path / "work").iterdir()) == []
    name = "model.layers.2.self_attn.k_scale"
    assert torch.equal(found.weights[name].load(), expected.weights[name].load())


def test_the_reference_rounds_keys_and_values(model: Model) -> None:
    found = quantized(model)
    seen = []
    Reference(found, keys_values=lambda i, k, v: seen.append((i, k, v)) or (k, v)).hidden_states(TEXT.ids)
    index, keys, _ = seen[0]
    scale = found.cache_scales(index)[0].dense().reshape(1, 2, 1, 16)
    by_hand = Reference(found, keys_values=lambda i, k, v: _rounded(found, i, k, v)).logits(TEXT.ids)
    assert by_hand.equal(Reference(found).logits(TEXT.ids))
    assert (keys / scale).abs().max() <= 127.01


def _rounded(model: Model, index: int, *pair: torch.Tensor) -> tuple[torch.Tensor, ...]:
    scales = [weight.dense().reshape(1, 2, 1, 16) for weight in model.cache_scales(index)]
    return tuple((x / s).round().clamp(-128, 127) * s for x, s in zip(pair, scales, strict=True))


def test_text_is_not_made_with_a_quantized_cache(model: Model) -> None:
    from transformers import DynamicCache

    with pytest.raises(UnsupportedError, match="cache is quantized"):
        Reference(quantized(model)).decode(TEXT.ids, DynamicCache())


def test_every_family_runs_it_or_refuses_it_by_name(
    family_name: str, family_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_model(str(family_of(family_name)), cache=tmp_path / "cache")
    if any(layer.attention.head_dim % 8 for layer in model.decoder.layers):
        with pytest.raises(PassError, match=r"layers.*heads of \d+ columns"):
            KvCache().requires(model)
        return
    found = quantized(model)
    (tmp_path / "build").mkdir()
    engine, _ = Onnx(capacity=CAPACITY).export(found, tmp_path / "build", PassContext(fallback=pytest.fail))
    assert (engine.kv_dtype, engine.features) == ("int8", ["int8_kv", "kernels"])
    backend = open_backend(tmp_path / "build", engine, slots=2, capacity=CAPACITY, threads=1)
    expected = logits(found)
    rows = [backend.prefill(0, row, 0, np.arange(len(row))) for row in IDS]
    assert error(np.stack(rows), expected) < TOLERANCE


@pytest.mark.parametrize("scheme", [None, "W8A8", "W4A16"])
def test_a_sequence_is_decoded_to_the_same_bits_whatever_shares_the_step(
    model: Model, scheme: str | None, tmp_path: Path
) -> None:
    if scheme is not None:
        model = RoundToNearest(scheme=scheme, group_size=None if scheme == "W8A8" else 32).run(model, PassContext())
    engine, _ = Onnx(capacity=CAPACITY).export(quantized(model, strategy="tensor"), tmp_path, PassContext())
    backend = open_backend(tmp_path, engine, slots=4, capacity=CAPACITY, threads=1)
    lengths = np.array([13, 5, 9])
    for slot, row in enumerate(IDS):
        backend.prefill(slot, row[: lengths[slot]], 0, np.arange(0))
    together = backend.decode(IDS[:, -1], lengths).copy()
    for slot, row in enumerate(IDS):
        backend.prefill(0, row[: lengths[slot]], 0, np.arange(0))
        np.testing.assert_array_equal(together[slot], backend.decode(row[-1:], lengths[slot : slot + 1])[0])


def test_a_cache_that_is_quantized_already_is_refused(model: Model) -> None:
    with pytest.raises(PassError, match="already quantized"):
        KvCache().requires(quantized(model))


def test_keys_that_are_not_finite_are_named(model: Model) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    broken = model.with_weights({name: DenseWeight.of(torch.full(model.weights[name].shape, torch.inf))})
    with pytest.raises(PassError, match=r"model.layers.1: keys or values are not finite"):
        quantized(broken)


@pytest.mark.parametrize("name", ["rescale", "rotate", "smoothquant", "awq"])
def test_passes_that_change_values_are_refused_behind_it(model, name: str) -> None:
    one = loader.load("passes", name)(**({"scheme": "W8A16"} if name == "awq" else {}))
    with pytest.raises(PassError, match="the cache is already quantized") as caught:
        one.requires(quantized(model))
    assert caught.value.hint == f"put {name} before kv_cache"
