"""Engines that take adapters: against the same adapters merged, and every sequence as if it were alone."""

from collections import Counter

import numpy as np
import pytest

from llmopt.exporters.onnx.exporter import Onnx
from llmopt.exporters.onnx.lora import LoraOptions, lora_slots
from llmopt.exporters.onnx.lowering import finished, stages
from llmopt.exporters.onnx.verify import verify_lowering
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.lora.adapter_file import write_adapter
from llmopt.optimizer.lora.fitting import fit_adapter
from llmopt.optimizer.manifest import LORA_FEATURE
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.target import TARGETS
from llmopt.passes.merge_lora import MergeLora
from llmopt.passes.rotate import Rotate
from llmopt.passes.round_to_nearest import RoundToNearest
from llmopt.runtime.backends.onnxruntime import open_backend

CAPACITY = 32
CONTEXT = PassContext(verify="none")
OPTIONS = LoraOptions(max_rank=8, slots=2)
TARGETS_OF = {"gpt2": ["c_attn", "c_proj", "c_fc"], "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def opened(tmp_path):
    """``opened(model, **options)``: an exported engine with four slots, and its build's directory."""

    def make(model, **options):
        directory = tmp_path / f"build{len(list(tmp_path.glob('build*')))}"
        engine, _ = Onnx(capacity=CAPACITY, **options).export(model, directory, CONTEXT)
        return open_backend(directory, engine, slots=4, capacity=CAPACITY, threads=2), directory

    return make


@pytest.fixture
def loaded(tmp_path):
    """``loaded(backend, build, slot, folder)``: an adapter of PEFT in one of an engine's slots."""

    def load(backend, build, slot, folder):
        factors = fit_adapter(folder, build, backend.engine.lora).factors
        backend.adapters.load(slot, write_adapter("it", tmp_path / f"{slot}.safetensors", factors))

    return load


def greedy(backend, prompt, count=16):
    """The most likely tokens behind a prompt, in slot 0."""
    tokens = [int(backend.prefill(0, prompt, 0, np.array([len(prompt) - 1]))[0].argmax())]
    while len(tokens) < count:
        place = np.array([len(prompt) + len(tokens) - 1])
        tokens.append(int(backend.decode(np.array(tokens[-1:]), place)[0].argmax()))
    return tokens


@pytest.mark.parametrize(
    ("family", "rotated"),
    [*((name, False) for name in ("llama", "qwen3", "gpt2", "phi3", "gemma2")), ("llama", True), ("gpt2", True)],
)
def test_an_adapter_beside_the_weights_generates_what_it_does_merged(
    family, rotated, family_of, adapter_of, opened, loaded, tmp_path
):
    targets = TARGETS_OF.get(family, LINEARS)
    adapter_of(tmp_path / "a", family_of(family), target_modules=targets, lora_alpha=16, use_rslora=True)
    source = load_model(str(family_of(family)), cache=tmp_path)
    merged = MergeLora(adapters=[{"path": str(tmp_path / "a")}]).run(source, PassContext())
    base = Rotate().run(source, PassContext(seed=1)) if rotated else source
    backend, build = opened(base, lora=OPTIONS)
    loaded(backend, build, 2, tmp_path / "a")
    expected, plain = opened(merged)[0], opened(source)[0]
    prompt = np.random.default_rng(1).integers(3, 100, 12)
    assert greedy(backend, prompt) == greedy(plain, prompt)
    backend.adapters.choose([2])
    assert greedy(backend, prompt) == greedy(expected, prompt)
    logits = [each.prefill(1, prompt, 0, np.arange(12)) for each in (backend, expected, plain)]
    scale = np.abs(logits[1]).max()
    # Merged weights are rounded to float32 once more, and sums run in another order.
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4 * scale)
    assert np.abs(logits[0] - logits[2]).max() > 1e-2 * scale


@pytest.mark.parametrize(
    ("scheme", "dtype"), [(None, "float32"), ("W8A8", "bfloat16"), ("W8A16", "float32"), ("W4A16", "bfloat16")]
)
def test_a_sequence_has_the_same_bits_alone_and_beside_other_adapters(
    scheme, dtype, family_of, adapter_of, opened, loaded, tmp_path
):
    base = load_model(str(family_of("llama")), cache=tmp_path)
    if scheme is not None:
        size = {"group_size": 16} if scheme == "W4A16" else {}
        base = RoundToNearest(scheme=scheme, **size).run(base, PassContext())
    backend, build = opened(base, lora=OPTIONS.model_copy(update={"dtype": dtype}))
    assert backend.engine.batch_invariant
    for slot, settings in enumerate(({"r": 8}, {"r": 3, "target_modules": ["q_proj", "up_proj"]}), start=1):
        chosen = {"target_modules": LINEARS} | settings
        adapter_of(tmp_path / f"a{slot}", family_of("llama"), seed=slot, **chosen)
        loaded(backend, build, slot, tmp_path / f"a{slot}")
    prompts = np.random.default_rng(2).integers(3, 100, (4, 9))
    adapters = [1, 0, 2, 1]

    def prefill(slot, number):
        backend.adapters.choose([adapters[number]])
        return backend.prefill(slot, prompts[number], 0, np.arange(9))

    prompt_rows = [prefill(slot, slot) for slot in range(4)]
    backend.adapters.choose(adapters)
    together = backend.decode(prompts[:, 0], np.full(4, 9)).copy()
    for number in range(4):
        assert np.array_equal(prefill(0, number), prompt_rows[number])
        assert np.array_equal(backend.decode(prompts[number, :1], np.array([9]))[0], together[number])


def test_a_sequence_without_an_adapter_has_the_bits_of_an_engine_that_takes_none(
    family_of, opened, loaded, adapter_of, tmp_path
):
    base = RoundToNearest(scheme="W8A8").run(load_model(str(family_of("llama")), cache=tmp_path), PassContext())
    adapter_of(tmp_path / "a", family_of("llama"), target_modules=LINEARS)
    backend, build = opened(base, lora=OPTIONS)
    loaded(backend, build, 1, tmp_path / "a")
    plain, _ = opened(base)
    prompt = np.arange(3, 20)
    assert np.array_equal(*(each.prefill(0, prompt, 0, np.arange(17)) for each in (backend, plain)))
    backend.prefill(1, prompt, 0, np.arange(17))
    backend.adapters.choose([0, 1])
    mixed = backend.decode(np.array([5, 5]), np.array([17, 17]))
    assert np.array_equal(mixed[0], plain.decode(np.array([5]), np.array([17]))[0])
    assert not np.array_equal(mixed[0], mixed[1])


@pytest.mark.parametrize("scheme", [None, "W8A8", "W4A16", "FP8_DYNAMIC"])
@pytest.mark.parametrize("own", [False, True])
def test_every_graph_pass_keeps_what_adapters_do(scheme, own, family_of, tmp_path):
    base = load_model(str(family_of("llama")), cache=tmp_path)
    if scheme is not None:
        base = RoundToNearest(scheme=scheme, **({"group_size": 16} if scheme == "W4A16" else {})).run(base, CONTEXT)
    target = TARGETS["cpu"].with_adapters() if own else TARGETS["cpu"]
    found = verify_lowering(base, target, level="quick", seed=0, lora=OPTIONS)
    assert all(difference < 1e-5 for passes in found.values() for difference in passes.values())
    assert all(("lower_lora" in passes) == own for passes in found.values())


def test_kernels_stay_together_where_adapters_are_added(family_of, tmp_path):
    """A layer in W8A8 has the operators it has without adapters, and one more for each packed linear."""
    base = RoundToNearest(scheme="W8A8").run(load_model(str(family_of("llama")), cache=tmp_path), CONTEXT)
    found = []
    for lora, target in ((None, TARGETS["cpu"].with_kernels()), (OPTIONS, TARGETS["cpu"].with_adapters())):
        graph, _ = finished(stages(base, target, capacity=CAPACITY, lora=lora))
        found.append(Counter(node.op_type for node in graph.graph))
    added = found[1] - found[0]
    assert added.pop("LoraAddBfloat16") == 4 * base.num_layers
    assert not found[0] - found[1]
    sums = [node for node in graph.graph if node.op_type == "LoraAddBfloat16"]
    assert all(node.inputs[0].shape == node.outputs[0].shape for node in sums)  # else they cannot be in place
    assert sum(added.values()) <= 6  # each token's adapter, computed once


def test_a_norms_bias_that_was_folded_in_needs_one_of_the_adapter(family_of, tmp_path):
    base = Rotate().run(load_model(str(family_of("gpt2")), cache=tmp_path), PassContext())
    slots = lora_slots(base, base.decoder, OPTIONS)
    assert {module.name.rpartition(".")[2] for module in slots.modules if module.biased} == {"c_attn", "c_fc"}
    found = verify_lowering(base, TARGETS["cpu"].with_adapters(), level="quick", seed=0, lora=OPTIONS)
    assert all(difference < 1e-5 for passes in found.values() for difference in passes.values())


def test_onnxruntimes_kernels_promise_no_bits(family_of, opened, adapter_of, loaded, tmp_path):
    """Their product of one row with factors that are no weights sums otherwise than that of several."""
    adapter_of(tmp_path / "a", family_of("llama"), target_modules=LINEARS)
    base = load_model(str(family_of("llama")), cache=tmp_path)
    prompt, found = np.arange(3, 20), []
    for kernels in ("onnxruntime", "llmopt"):
        backend, build = opened(base, lora=OPTIONS, kernels=kernels)
        loaded(backend, build, 1, tmp_path / "a")
        backend.adapters.choose([1])
        assert backend.engine.batch_invariant == (kernels == "llmopt")
        found.append(backend.prefill(0, prompt, 0, np.arange(17)))
    np.testing.assert_allclose(*found, atol=2e-5)


@pytest.mark.parametrize("kernels", ["llmopt", "onnxruntime"])
def test_factors_in_bfloat16_are_those_rounded(kernels, family_of, opened, adapter_of, loaded, tmp_path):
    adapter_of(tmp_path / "a", family_of("llama"), target_modules=LINEARS)
    base = load_model(str(family_of("llama")), cache=tmp_path)
    prompt, found = np.arange(3, 20), []
    for dtype in ("bfloat16", "float32"):
        backend, build = opened(base, lora=OPTIONS.model_copy(update={"dtype": dtype}), kernels=kernels)
        loaded(backend, build, 1, tmp_path / "a")
        found.append(backend.prefill(0, prompt, 0, np.arange(17)))
        backend.adapters.choose([1])
        found.append(backend.prefill(0, prompt, 0, np.arange(17)))
    effect = np.abs(found[3] - found[2]).mean()
    assert 0 < np.abs(found[1] - found[3]).mean() < 0.01 * effect  # a step of bfloat16 is 2^-8
    assert np.array_equal(found[0], found[2])


def test_what_is_quantized_has_factors_in_bfloat16(family_of, tmp_path):
    base = load_model(str(family_of("llama")), cache=tmp_path)
    quantized = RoundToNearest(scheme="W8A8").run(base, CONTEXT)
    assert [lora_slots(each, each.decoder, OPTIONS).dtype for each in (base, quantized)] == ["float32", "bfloat16"]
    chosen = OPTIONS.model_copy(update={"dtype": "float32"})
    assert lora_slots(quantized, quantized.decoder, chosen).dtype == "float32"


def test_factors_lie_one_behind_the_other(family_of, tmp_path):
    model = load_model(str(family_of("llama")), cache=tmp_path)
    slots = lora_slots(model, model.decoder, LoraOptions(max_rank=4, slots=3, targets=["v_proj", "mlp.down_proj"]))
    at = 0
    for module in slots.modules:
        assert module.name.endswith(("self_attn.v_proj", "mlp.down_proj"))
        assert (module.outputs, module.inputs) == model.weights[f"{module.name}.weight"].shape
        assert (module.down, module.up) == (at, at + 4 * module.inputs)
        at = module.up + 4 * module.outputs
    assert slots.size == at
    assert len(slots.modules) == 2 * model.num_layers


def test_a_target_that_is_no_linear_is_named(family_of, tmp_path):
    model = load_model(str(family_of("llama")), cache=tmp_path)
    with pytest.raises(InputError, match="c_attn is no linear") as error:
        Onnx(lora={"targets": ["q_proj", "c_attn"]}).check(model)
    assert error.value.hint == "these are: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


def test_experts_and_packed_groups_take_no_adapters(family_of, tmp_path):
    mixture = load_model(str(family_of("mixtral")), cache=tmp_path)
    names = {module.name for module in lora_slots(mixture, mixture.decoder, OPTIONS).modules}
    assert not names & mixture.decoder.expert_linears
    assert any(name.endswith("q_proj") for name in names)
    grouped = load_model(str(family_of("gpt_neox")), cache=tmp_path)
    assert not any("query_key_value" in module.name for module in lora_slots(grouped, grouped.decoder, OPTIONS).modules)


@pytest.mark.parametrize("options", [{"target": "cuda"}, {"flavor": "genai"}])
def test_other_engines_take_none(options, family_of, tmp_path):
    model = load_model(str(family_of("llama")), cache=tmp_path)
    with pytest.raises(UnsupportedError, match="lora is for target: cpu and flavor: llmopt"):
        Onnx(lora={}, **options).check(model)


def test_the_manifest_says_that_it_takes_adapters(family_of, opened, tmp_path):
    backend, build = opened(load_model(str(family_of("llama")), cache=tmp_path), lora=OPTIONS)
    assert LORA_FEATURE in backend.engine.features
    assert backend.engine.lora.max_rank == 8
    assert [tensor.name for tensor in backend.engine.inputs][3:6] == ["adapters", "lora.factors", "lora.ranks"]
    assert (build / "lora" / "base.json").is_file()
