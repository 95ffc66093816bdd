"""Every family's fp32 engine against transformers, and that each of its features would be missed.

At the small weights transformers starts from, a forgotten feature can stay below any tolerance: leaving out Gemma 2's
cap of the scores moves logits by 2e-7. So the models here have weights of standard deviation 0.2 or more, and each
feature is switched off in our description once, to see the difference grow to at least 100 times the tolerance.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from inspect import unwrap
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmopt.exporters.onnx.exporter import Onnx
from llmopt.exporters.onnx.standard import standard_graph
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.decoder import Attention, Decoder, Experts, Layer, Norm
from llmopt.optimizer.model import Model
from llmopt.optimizer.sources import load_model
from llmopt.runtime.backends.onnxruntime import OnnxRuntimeBackend, open_backend

TOLERANCE = 1e-4
"""Largest difference of logits over the largest logit. Measured: 1e-7 to 4e-6, sums in another order."""

CAPACITY = 96


@dataclass(frozen=True)
class Family:
    """A tiny checkpoint of one family, loaded by llmopt and by transformers."""

    name: str
    model: Model
    network: torch.nn.Module
    directory: Path

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """What transformers computes for one sequence, float32 ``[tokens, vocab]``."""
        with torch.no_grad():
            return self.network(torch.from_numpy(ids[None])).logits[0].numpy()

    def greedy(self, ids: np.ndarray, count: int) -> list[int]:
        """The tokens transformers appends to ``ids``, each time the likeliest."""
        tokens = list(ids)
        for _ in range(count):
            tokens.append(int(self.logits(np.array(tokens))[-1].argmax()))
        return tokens[len(ids) :]


def hold_rope(network: torch.nn.Module, length: int) -> None:
    """Fix rope at its frequencies for ``length`` tokens, as an engine has them, where they change with the length."""
    for module in network.modules():
        kind = getattr(module, "rope_type", None)
        if kind in ("dynamic", "longrope"):
            module.inv_freq, module.attention_scaling = ROPE_INIT_FUNCTIONS[kind](module.config, "cpu", seq_len=length)
            module.forward = partial(unwrap(type(module).forward), module)


@pytest.fixture(scope="module")
def family(family_name: str, family_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Family:
    directory = family_of(family_name)
    model = load_model(str(directory), cache=tmp_path_factory.mktemp("cache"))
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    hold_rope(network, CAPACITY)
    return Family(family_name, model, network, directory)


@pytest.fixture(scope="module")
def backend(family: Family, tmp_path_factory: pytest.TempPathFactory) -> OnnxRuntimeBackend:
    """The lowered fp32 engine with a pool of four slots."""
    build = tmp_path_factory.mktemp("build")
    exporter = Onnx(capacity=CAPACITY)
    exporter.check(family.model)
    engine, _ = exporter.export(family.model, build, PassContext(verify="none"))
    return open_backend(build, engine, slots=4, capacity=CAPACITY, threads=1)


@pytest.fixture
def ids(family: Family) -> np.ndarray:
    return np.random.default_rng(7).integers(3, family.model.decoder.vocab_size, CAPACITY)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def prefilled(backend: OnnxRuntimeBackend, ids: np.ndarray, *, chunk: int) -> np.ndarray:
    """Logits of one sequence that enters slot 0 in chunks."""
    starts = range(0, len(ids), chunk)
    pieces = [(start, ids[start : start + chunk]) for start in starts]
    return np.concatenate([backend.prefill(0, piece, start, np.arange(len(piece))) for start, piece in pieces])


def decoded(backend: OnnxRuntimeBackend, ids: np.ndarray, *, first: int) -> np.ndarray:
    """Logits behind the last token, with every token from ``first`` on in a step of its own."""
    backend.prefill(0, ids[:first], 0, np.array([first - 1]))
    for position in range(first, len(ids)):
        logits = backend.decode(ids[position : position + 1], np.array([position]))
    return logits.copy()


def ragged(backend: OnnxRuntimeBackend, ids: np.ndarray, lengths: list[int]) -> np.ndarray:
    """Logits of one decode step over slots of different lengths, each a prefix of ``ids``."""
    for slot, length in enumerate(lengths):
        backend.prefill(slot, ids[:length], 0, np.array([length - 1]))
    return backend.decode(ids[lengths], np.array(lengths)).copy()


def generated(backend: OnnxRuntimeBackend, ids: np.ndarray, count: int) -> list[int]:
    logits = backend.prefill(0, ids, 0, np.array([len(ids) - 1]))
    tokens: list[int] = []
    for position in range(len(ids), len(ids) + count):
        tokens.append(int(logits[0].argmax()))
        logits = backend.decode(np.array(tokens[-1:]), np.array([position]))
    return tokens


def test_the_engine_computes_what_transformers_does(
    family: Family, backend: OnnxRuntimeBackend, ids: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = [5, 23, 40]
    expected = family.logits(ids)
    found = {
        "prefill": difference(prefilled(backend, ids[:64], chunk=64), expected[:64]),
        "chunks of 7": difference(prefilled(backend, ids[:63], chunk=7), expected[:63]),
        "after 40 decode steps": difference(decoded(backend, ids[:48], first=8), expected[47:48]),
        "ragged slots": difference(ragged(backend, ids, lengths), expected[lengths]),
    }
    same = generated(backend, ids[:8], 64) == family.greedy(ids[:8], 64)
    with capsys.disabled():
        figures = "  ".join(f"{name} {value:.1e}" for name, value in found.items())
        sys.stdout.write(f"\n{family.name:<22} {figures}  greedy {'64 of 64 equal' if same else 'DIFFERENT'}")
    assert max(found.values()) < TOLERANCE
    assert same


def test_a_sequence_is_decoded_to_the_same_bits_whatever_shares_the_step(
    backend: OnnxRuntimeBackend, ids: np.ndarray
) -> None:
    together = ragged(backend, ids, [17, 5, 40])
    for slot, length in enumerate((17, 5, 40)):
        np.testing.assert_array_equal(ragged(backend, ids, [length])[0], together[slot])


def test_each_feature_would_be_missed(family: Family, ids: np.ndarray) -> None:
    expected = family.logits(ids)[:40]
    without = {name: difference(logits_of(*changed, ids[:40]), expected) for name, changed in features(family.model)}
    assert difference(logits_of(family.model, family.model.decoder, ids[:40]), expected) < TOLERANCE
    assert {name: found for name, found in without.items() if not found > 100 * TOLERANCE} == {}


def logits_of(model: Model, decoder: Decoder, ids: np.ndarray) -> np.ndarray:
    """The standard graph of ``decoder`` with the model's weights, on one sequence without a past."""
    graph = standard_graph(model, capacity=CAPACITY, decoder=decoder)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), options)
    feeds: dict[str, np.ndarray] = {
        "input_ids": ids[None],
        "past_lengths": np.zeros(1, np.int64),
        "logit_rows": np.arange(len(ids)),
    }
    cache = np.zeros((1, decoder.kv_heads, CAPACITY, decoder.head_dim), np.float32)
    feeds |= {value.name: cache for value in session.get_inputs() if value.name.startswith("past.")}
    return session.run(["logits"], feeds)[0]


def features(model: Model) -> Iterator[tuple[str, tuple[Model, Decoder]]]:
    """Each feature that this model has, and the model or its description without it."""
    for name, without in [*OUTSIDE.items(), *LAYER.items(), *ATTENTION.items(), *MLP.items()]:
        changed = without(model.decoder)
        if changed != model.decoder:
            yield name, (model, changed)
    attention = model.decoder.layers[0].attention
    # Without rope a key's bias adds the same number to all scores of a token, which softmax takes out again.
    void = {attention.key} if attention.rope is None else set()
    kinds = {module.rpartition(".")[2] for module in model.linears()}
    for kind in sorted(kinds - {str(name).rpartition(".")[2] for name in void}):
        biases = {f"{module}.bias" for module in model.linears() if module.endswith(kind)}
        if biases & model.weights.keys():
            kept = {name: weight for name, weight in model.weights.items() if name not in biases}
            yield f"bias of {kind}", (replace(model, weights=MappingProxyType(kept)), model.decoder)


def _layers(change: Callable[[Layer], Layer], decoder: Decoder) -> Decoder:
    return replace(decoder, layers=tuple(change(layer) for layer in decoder.layers))


def _attention(change: Callable[[Attention], Mapping[str, Any]], decoder: Decoder) -> Decoder:
    return _layers(lambda layer: replace(layer, attention=replace(layer.attention, **change(layer.attention))), decoder)


def _mlp(change: Callable[[Any], Mapping[str, Any]], decoder: Decoder) -> Decoder:
    return _layers(lambda layer: replace(layer, mlp=replace(layer.mlp, **change(layer.mlp))), decoder)


def _norms(change: Callable[[Norm], Norm], decoder: Decoder) -> Decoder:
    """Every norm of the model changed."""
    places = ("attention_in", "attention_out", "attention_after", "mlp_in", "mlp_out", "mlp_after")

    def changed(part: Any, names: tuple[str, ...]) -> dict[str, Norm]:
        return {name: change(norm) for name in names if (norm := getattr(part, name)) is not None}

    def layer(old: Layer) -> Layer:
        attention = replace(old.attention, **changed(old.attention, ("query_norm", "key_norm")))
        return replace(old, attention=attention, **changed(old, places))

    return _layers(layer, replace(decoder, **changed(decoder, ("final_norm",))))


def _rope_everywhere(decoder: Decoder) -> Decoder:
    """Rope in the layers that have none, if others have it."""
    ropes = [layer.attention.rope for layer in decoder.layers if layer.attention.rope is not None]
    return _attention(lambda old: {"rope": old.rope or ropes[0]}, decoder) if ropes else decoder


def _one_rope(decoder: Decoder) -> Decoder:
    """The last layer's rope in all layers that have one."""
    last = decoder.layers[-1].attention.rope
    return _attention(lambda old: {"rope": last if old.rope else None}, decoder)


def _rope_on_whole_heads(decoder: Decoder) -> Decoder:
    parts = [layer.attention.rope.dim for layer in decoder.layers if layer.attention.rope]
    return decoder if set(parts) <= {decoder.head_dim} else _rope(decoder, kind="default", dim=decoder.head_dim)


def _rope(decoder: Decoder, **changes: Any) -> Decoder:
    return _attention(lambda old: {"rope": old.rope and replace(old.rope, **changes)}, decoder)


def _without_norm(place: str) -> Callable[[Decoder], Decoder]:
    return partial(_layers, lambda layer: replace(layer, **{place: None}))


def _top_1(mlp: Any) -> Mapping[str, Any]:
    return {"top_k": 1} if isinstance(mlp, Experts) else {}


def _other_shares(mlp: Any) -> Mapping[str, Any]:
    return {"normalize": not mlp.normalize} if isinstance(mlp, Experts) else {}


OUTSIDE: Mapping[str, Callable[[Decoder], Decoder]] = {
    "scale of embeddings": lambda decoder: replace(decoder, embedding_scale=1.0),
    "learned positions": lambda decoder: replace(decoder, positions=None),
    "first row of positions": lambda decoder: replace(decoder, positions_offset=0),
    "final norm": lambda decoder: replace(decoder, final_norm=None),
    "scale of logits": lambda decoder: replace(decoder, logit_scale=1.0),
    "cap of logits": lambda decoder: replace(decoder, logit_softcap=None),
    "offset of norms": partial(_norms, lambda norm: replace(norm, offset=0.0)),
    "mean and bias of LayerNorm": partial(_norms, lambda norm: replace(norm, kind="rms")),
}
LAYER: Mapping[str, Callable[[Decoder], Decoder]] = {
    "parallel branches": partial(_layers, lambda layer: replace(layer, parallel=False)),
    "scale of branches": partial(_layers, lambda layer: replace(layer, residual_scale=1.0)),
    "norm before attention": _without_norm("attention_in"),
    "norm behind attention": _without_norm("attention_out"),
    "norm behind attention's addition": _without_norm("attention_after"),
    "norm before the MLP": _without_norm("mlp_in"),
    "norm behind the MLP": _without_norm("mlp_out"),
    "norm behind the MLP's addition": _without_norm("mlp_after"),
}
ATTENTION: Mapping[str, Callable[[Decoder], Decoder]] = {
    "window": partial(_attention, lambda old: {"window": None}),
    "cap of scores": partial(_attention, lambda old: {"softcap": None}),
    "scale of scores": partial(_attention, lambda old: {"scale": old.head_dim**-0.5}),
    "norm of query": partial(_attention, lambda old: {"query_norm": None}),
    "norm of key": partial(_attention, lambda old: {"key_norm": None}),
    # With one KV head both ways of packing are the same.
    "rows by KV head": partial(_attention, lambda old: {"packing": "parts"} if old.kv_heads > 1 else {}),
    "rope": partial(_attention, lambda old: {"rope": None}),
    "layers without rope": _rope_everywhere,
    "another rope in other layers": _one_rope,
    "kind of rope": partial(_rope, kind="default"),
    "rope on a part of each head": _rope_on_whole_heads,
}
MLP: Mapping[str, Callable[[Decoder], Decoder]] = {
    "activation": partial(_mlp, lambda old: {"activation": "relu" if old.activation != "relu" else "silu"}),
    "several experts for a token": partial(_mlp, _top_1),
    "shares of experts": partial(_mlp, _other_shares),
}
