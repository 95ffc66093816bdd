"""Every family and scheme as TensorRT parses and compiles it, and what its graph computes on a CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llmopt.calibration.reference import Reference
from llmopt.calibration.texts import read_tokens
from llmopt.evaluation.measure import measure
from llmopt.evaluation.proxy import check_range, measurable, measurable_encoder
from llmopt.evaluation.vectors import measure_vectors
from llmopt.exporters.tensorrt.exporter import TensorRT
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.manifest import EncoderEngine, Engine
from llmopt.optimizer.model import Model
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens
from llmopt.passes.round_to_nearest import RoundToNearest

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

SENTENCES = Path(__file__).parents[2] / "recipes/texts/sentences.txt"
CAPACITY = 32
TEXT = Tokens("random", torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(0)), "0" * 64)


def exported(model: Model, directory: Path, **options: object) -> Engine:
    engine, _ = TensorRT(targets=["sm89"], capacity=CAPACITY, **options).export(model, directory, PassContext())
    assert isinstance(engine, Engine)
    return engine


def errors(model: Model, directory: Path, engine: Engine) -> np.ndarray:
    """``rms(difference) / std(logits)`` of each row, of the graph against the reference of the same model."""
    ids = TEXT.ids[0]
    reference = Reference(model)
    expected = reference.head(reference.hidden_states(ids[None])[0]).float().numpy()
    backend = measurable(directory, engine, longest=len(ids), threads=1).open()
    found = backend.prefill(0, ids.numpy(), 0, np.arange(len(ids)))
    return np.sqrt(((found - expected) ** 2).mean(-1)) / expected.std(-1)


def test_every_family_is_compiled(family_name, family_of, tmp_path):
    model = load_model(str(family_of(family_name)), cache=tmp_path / "cache")

    engine = exported(model, tmp_path)

    assert (tmp_path / engine.compiled["sm89"]).stat().st_size > 10_000
    # A dozen roundings to 2^-11 in each of two layers, at weights that are larger than those of any real model.
    assert np.median(errors(model, tmp_path, engine)) < 0.03


INT8 = {"num_bits": 8, "strategy": "tensor"}
SCHEMES = {
    "W8A8_STATIC": {"scheme": "W8A8_STATIC", "head": "none"},
    "W8A8_STATIC head": {"scheme": "W8A8_STATIC", "head": "W8A8_STATIC"},
    "W8A8_STATIC per tensor": {"scheme": {"weights": INT8, "input_activations": INT8}, "head": "none"},
    "FP8": {"scheme": "FP8"},
    "FP8 weights": {"scheme": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
    "W4A16 g16": {"scheme": "W4A16", "group_size": 16},
    "W4A16 g32": {"scheme": "W4A16", "group_size": 32, "embedding": "W8A16"},
    "W4A16 channel": {"scheme": "W4A16", "group_size": -1},
    "W3A16": {"scheme": "W3A16", "group_size": 32},
    "W8A16": {"scheme": "W8A16"},
    "W8A16 g32": {"scheme": "W8A16", "group_size": 32},
}
ROUNDED = 0.3
"""Accepted where inputs are rounded: in 16 bits many round the other way than in the reference's float32."""


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "fp16") for name in SCHEMES), *((name, "bf16") for name in ("W8A8_STATIC", "FP8", "W4A16 channel"))],
)
def test_every_scheme_is_compiled(name, precision, llama_of, tmp_path):
    options = SCHEMES[name]
    context = PassContext(calibration=lambda: TEXT)
    model = load_model(str(llama_of()), cache=tmp_path / "cache")
    model = RoundToNearest(**options).run(model, context)

    engine = exported(model, tmp_path, precision=precision)

    assert (tmp_path / engine.compiled["sm89"]).stat().st_size > 10_000
    rounds = RoundToNearest(**options).scheme.input_activations is not None
    assert np.median(errors(model, tmp_path, engine)) < (ROUNDED if rounds else 0.03)


def least_cosine(model: Model, directory: Path, engine: EncoderEngine) -> float:
    """Of vectors of the encoder's graph and of the model's own, the two that are least alike."""
    measured = measurable_encoder(directory, engine, threads=1)
    assert measured.proxy is not None
    texts = Tokens(name="random", ids=TEXT.ids, digest="0" * 64, lengths=torch.tensor([12, 5, 9, 1]))
    return measure_vectors(model, measured.open(), [texts])[1].value


def test_every_encoder_is_compiled(encoder_name, encoder_of, tmp_path):
    model = load_model(str(encoder_of(encoder_name)), cache=tmp_path / "cache")

    exporter = TensorRT(targets=["sm89"], capacity=16, slots=2)
    engine, _ = exporter.export(model, tmp_path, PassContext(verify="none"))

    assert (tmp_path / engine.compiled["sm89"]).stat().st_size > 10_000
    assert (engine.slots, engine.capacity, engine.features) == (2, 16, ["tensorrt_rtx"])
    # A dozen roundings to 2^-11 in each layer; another pooling or a mask left out gives less than 0.9.
    assert least_cosine(model, tmp_path, engine) > 0.9999


def test_an_encoder_in_bfloat16_is_measured_in_float32(encoder_of, tmp_path):
    model = load_model(str(encoder_of("bert")), cache=tmp_path / "cache")
    exporter = TensorRT(targets=["sm89"], capacity=16, precision="bf16")
    engine, _ = exporter.export(model, tmp_path, PassContext(verify="none"))
    assert engine.dtype == "bfloat16"
    # Weights are rounded to 2^-8.
    assert least_cosine(model, tmp_path, engine) > 0.99


@pytest.mark.real_model
def test_a_real_model_predicts_the_same_in_float16(smollm2, tmp_path):
    text = read_tokens(SENTENCES, smollm2.source.tokenizer_dir, windows=2, tokens=256)
    directory, exporter = tmp_path, TensorRT(targets=["sm89"], capacity=256, max_chunk=256)
    engine, records = exporter.export(smollm2, directory, PassContext(verify="none"))

    found = {
        each.metric: each.value
        for each in measure(smollm2, measurable(directory, engine, longest=256, threads=2).open, [text], threads=2)
    }
    range_record = check_range(
        directory, engine, [text], layers=[layer.name for layer in smollm2.decoder.layers], threads=2
    )

    assert found["top1"] > 0.995
    assert found["kl"] < 1e-4
    weights = (directory / "tensorrt/model.onnx.data").stat().st_size
    assert 1 < (directory / engine.compiled["sm89"]).stat().st_size / weights < 1.1
    assert records[-1].details["network"] == {"products": 211, "quantized": 0, "caches in place": 60}
    assert 10_000 < max(range_record.details.values()) < 32_752  # attention sinks
