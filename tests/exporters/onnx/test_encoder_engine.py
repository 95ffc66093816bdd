"""What an encoder's engine is written as: pooling in the graph, and a folder in the form of sentence-transformers."""

import json
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
import torch

from llmopt.calibration.encoder_reference import EncoderReference
from llmopt.exporters.onnx.exporter import Onnx
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.pooling import Pooling, read_pooling
from llmopt.optimizer.sources import load_model


@pytest.fixture
def model(encoder_of, tmp_path):
    return load_model(str(encoder_of("bert", num_hidden_layers=1)), cache=tmp_path / "cache")


def exported(model, directory, **options):
    engine, _ = Onnx(**options).export(model, directory, PassContext(verify="none"))
    return engine


def vectors(directory, engine, ids, mask):
    session = ort.InferenceSession(directory / engine.path)
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return session.run(["sentence_embedding"], feeds)[0]


@pytest.mark.parametrize(
    ("mode", "normalize"),
    [
        ("mean", True),
        ("mean", False),
        ("cls", True),
        ("max", True),
        ("mean_sqrt_len_tokens", False),
        ("lasttoken", True),
    ],
)
def test_pooling_is_part_of_the_graph(model, tmp_path, mode, normalize):
    engine = exported(model, tmp_path, pooling=mode, normalize=normalize)
    assert (engine.pooling, engine.normalize) == (mode, normalize)
    ids = np.random.default_rng(0).integers(3, 512, (3, 9))
    mask = (np.arange(9) < np.array([[9], [4], [1]])).astype(np.int64)
    reference = EncoderReference(model, pooling=Pooling(mode=mode, normalize=normalize))
    expected = reference.pooled(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    found = vectors(tmp_path, engine, ids, mask)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_the_folder_says_the_same_about_pooling_as_the_model(model, tmp_path):
    prompts = {"query": "query: "}
    pooling = Pooling(mode="cls", normalize=True, max_tokens=20, prompts=prompts, default_prompt="query", is_given=True)
    engine = exported(replace(model, pooling=pooling), tmp_path)
    found, _ = read_pooling(tmp_path / "engine")
    assert found == pooling
    assert engine.capacity == 20
    assert (engine.prompts, engine.default_prompt) == (prompts, "query")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.onnx", "model.onnx.data"):
        assert (tmp_path / "engine" / name).is_file()
    assert json.loads((tmp_path / "engine/config.json").read_text())["model_type"] == "bert"


def test_the_manifest_describes_the_engine(model, tmp_path):
    engine = exported(model, tmp_path)
    assert [(each.name, each.dtype, each.dims) for each in engine.inputs] == [
        (name, "int64", ["batch", "tokens"]) for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    assert [(each.name, each.dims) for each in engine.outputs] == [
        ("last_hidden_state", ["batch", "tokens", 64]),
        ("sentence_embedding", ["batch", 64]),
    ]
    assert (engine.num_layers, engine.hidden_size, engine.vocab_size, engine.pad_token) == (1, 64, 512, 1)
    assert (engine.capacity, engine.pooling, engine.normalize, engine.features) == (64, "mean", False, [])


@pytest.mark.parametrize("options", [{"pooling": "cls"}, {"normalize": False}])
def test_a_recipe_that_contradicts_the_models_files_is_refused(encoder_of, tmp_path, options):
    path = encoder_of("bert", pooling="pooling_mode_mean_tokens")
    model = load_model(str(path), cache=tmp_path)
    with pytest.raises(InputError, match="the model's own files for pooling: mean with normalize"):
        Onnx(**options).check(model)
    Onnx(pooling="mean", normalize=True).check(model)


def test_a_length_beyond_the_positions_is_refused(model):
    with pytest.raises(UnsupportedError, match="capacity 65 is beyond the model's 64 positions"):
        Onnx(capacity=65).check(model)


@pytest.mark.parametrize("options", [{"pooling": "mean"}, {"normalize": True}])
def test_a_decoder_is_not_pooled(tiny_llama, tmp_path, options):
    with pytest.raises(UnsupportedError, match="options for encoders, and llama is none"):
        Onnx(**options).check(load_model(str(tiny_llama), cache=tmp_path))


def test_two_exports_are_equal(model, tmp_path, encoder_traces):
    for name in ("first", "second"):
        encoder_traces.clear()
        exported(model, tmp_path / name)
    for path in (tmp_path / "first").rglob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes(), path
