"""Rope tables against transformers' own rotary embedding, what an engine fixes, and what has no table."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from llmopt.exporters.onnx.rope import check_rope, longest_with, rope_note, rope_tables
from llmopt.exporters.onnx.standard import standard_graph
from llmopt.optimizer.arch.llama import ARCH
from llmopt.optimizer.decoder import Rope
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.hf_config import complete
from llmopt.optimizer.resolver import describe

MAX_POSITIONS = 256
HEAD_DIM = 32
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


def longrope(columns=HEAD_DIM, **options):
    short, long = (list(np.linspace(1, last, columns // 2)) for last in (1.5, 9))
    return {"short_factor": short, "long_factor": long, "original_max_position_embeddings": 64} | options


KINDS = {
    "default": ("default", {}),
    "default, another base": ("default", {"rope_theta": 1e6}),
    "default, part of a head": ("default", {"partial_rotary_factor": 0.25}),
    "linear": ("linear", {"factor": 4.0}),
    "dynamic": ("dynamic", {"factor": 3.0}),
    "dynamic, part of a head": ("dynamic", {"factor": 3.0, "partial_rotary_factor": 0.5}),
    "yarn": ("yarn", YARN),
    "yarn, part of a head": ("yarn", YARN | {"partial_rotary_factor": 0.5}),
    "yarn, another base": ("yarn", YARN | {"rope_theta": 1e6}),
    "yarn, own attention factor": ("yarn", YARN | {"attention_factor": 0.7}),
    "yarn, own rotations": ("yarn", YARN | {"beta_fast": 16.0, "beta_slow": 2.0}),
    "yarn, fractional range": ("yarn", YARN | {"truncate": False}),
    "yarn, empty range": ("yarn", YARN | {"beta_fast": 3.0, "beta_slow": 3.0, "truncate": False}),
    "yarn, range beyond the head": ("yarn", YARN | {"rope_theta": 2.0}),
    "yarn, both mscale entries": ("yarn", YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}),
    "yarn, one mscale entry": ("yarn", YARN | {"mscale": 0.7}),
    "yarn, factor below 1": ("yarn", YARN | {"factor": 0.5}),
    "yarn, factor from lengths": ("yarn", {"factor": None, "original_max_position_embeddings": 64}),
    "llama3": ("llama3", LLAMA3 | {"rope_theta": 500000.0}),
    "llama3, part of a head": ("llama3", LLAMA3 | {"partial_rotary_factor": 0.5}),
    "longrope": ("longrope", longrope()),
    "longrope, own stretch": ("longrope", longrope(factor=16.0)),
    "longrope, no stretch": ("longrope", longrope(factor=0.5)),
    "longrope, own attention factor": ("longrope", longrope(attention_factor=1.19)),
    "longrope, part of a head": ("longrope", longrope(16, partial_rotary_factor=0.5)),
}
by_kind = pytest.mark.parametrize(("kind", "options"), KINDS.values(), ids=KINDS)


def written(kind, options):
    """The ``rope_parameters`` of a config."""
    return {"rope_type": kind, "rope_theta": 10000.0} | options


def rope_of(kind, **options):
    parameters = written(kind, options)
    del parameters["rope_type"]
    dim = int(HEAD_DIM * parameters.pop("partial_rotary_factor", 1))
    theta = parameters.pop("rope_theta")
    return Rope(kind=kind, theta=theta, dim=dim, max_positions=MAX_POSITIONS, parameters=parameters)


@by_kind
@pytest.mark.parametrize("capacity", [64, 65, MAX_POSITIONS, 2 * MAX_POSITIONS])
def test_the_tables_are_those_of_transformers(kind, options, capacity):
    """For a sequence as long as the capacity: 64 is where longrope changes, 256 where dynamic begins to."""
    config = LlamaConfig(
        head_dim=HEAD_DIM, max_position_embeddings=MAX_POSITIONS, rope_parameters=written(kind, options)
    )
    expected = Phi3RotaryEmbedding(config)(torch.zeros(1), torch.arange(capacity)[None])
    rope = rope_of(kind, **options)
    check_rope(rope)
    for found, wanted in zip(rope_tables(rope, capacity), expected, strict=True):
        assert (found.dtype, found.shape) == (np.float32, (capacity, rope.dim // 2))
        # transformers' frequencies are float32, off by up to 8 units in the last place of the largest, 1.
        np.testing.assert_allclose(found, wanted[0, :, : rope.dim // 2].numpy(), atol=capacity * 2**-21)


def test_far_positions_are_more_exact_than_float32_products():
    cos, _ = rope_tables(rope_of("default"), 8192)
    exact = np.cos(8191 * 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    np.testing.assert_allclose(cos[8191], exact, atol=1e-7)


@by_kind
def test_position_zero_turns_nothing(kind, options):
    cos, sin = rope_tables(rope_of(kind, **options), 1)
    assert (cos == cos[0, 0]).all()
    assert (sin == 0).all()


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="rope type 'proportional' is not supported") as caught:
        check_rope(rope_of("proportional"))
    assert caught.value.exit_code == 5
    assert caught.value.hint == "supported rope types: default, linear, dynamic, yarn, llama3, longrope"


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ("linear", "factor"),
        ("dynamic", "factor"),
        ("yarn", "original_max_position_embeddings"),
        ("llama3", "original_max_position_embeddings"),
        ("longrope", "original_max_position_embeddings"),
    ],
)
def test_a_kind_without_its_entries_names_the_missing_one(kind, missing):
    with pytest.raises(InputError, match=f"rope type {kind} needs '{missing}' in config.json's rope_parameters"):
        check_rope(rope_of(kind))


@pytest.mark.parametrize("part", [0.0, 0.03125, 0.35])
def test_a_width_without_pairs_is_refused(part):
    with pytest.raises(InputError, match=f"rotates {int(HEAD_DIM * part)} columns of each head"):
        check_rope(rope_of("default", partial_rotary_factor=part))


@pytest.mark.parametrize("columns", [16, 48])
def test_longrope_factors_of_another_head_size_are_refused(columns):
    with pytest.raises(InputError, match="gives no 16 finite frequencies") as caught:
        check_rope(rope_of("longrope", **longrope(columns)))
    assert "its factors belong to another head size" in caught.value.hint


def test_frequencies_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="gives no 16 finite frequencies"):
        check_rope(rope_of("linear", factor=float("nan")))


@by_kind
@pytest.mark.parametrize("capacity", [64, 65, MAX_POSITIONS, MAX_POSITIONS + 1])
def test_the_note_says_when_transformers_would_change_with_the_length(kind, options, capacity):
    rope = rope_of(kind, **options)
    note = rope_note(rope, capacity)
    if kind == "longrope":
        which = "short" if capacity == 64 else "long"
        assert note == f"longrope is fixed at its {which} factors by the capacity {capacity}; they change at 64 tokens"
    elif kind == "dynamic" and capacity > MAX_POSITIONS:
        assert note == "dynamic rope is fixed at the frequencies for 257 tokens, also for shorter sequences"
    else:
        assert note is None


@by_kind
def test_only_dynamic_reaches_beyond_the_models_positions(kind, options):
    expected = 3 * MAX_POSITIONS if kind == "dynamic" else MAX_POSITIONS
    assert longest_with(rope_of(kind, **options)) == expected


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_a_whole_model_with_it_equals_torch(model_of, engine_of, reference_logits, ids, kind):
    parameters = written(*KINDS[kind])
    model = model_of(num_hidden_layers=1, rope_parameters=parameters)
    assert model.config["rope_parameters"] == model.config["rope_parameters"] | parameters
    engine = engine_of(standard_graph(model, capacity=32), model.config)
    np.testing.assert_allclose(engine.logits(ids), reference_logits(model, ids), atol=1e-4)


def test_a_config_in_the_older_spelling_gives_the_same_rope():
    config = {
        "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 8,
        "max_position_embeddings": MAX_POSITIONS, "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3"} | LLAMA3,
    }  # fmt: skip
    rope = describe(ARCH, complete(config | {"model_type": "llama"}, ARCH, "here"), ()).layers[0].attention.rope
    assert rope == rope_of("llama3", rope_theta=500000.0, **LLAMA3)
