"""The layer-at-a-time execution against transformers' own forward pass and naive quantized arithmetic."""

from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from llmopt.calibration.activations import quantize_per_token
from llmopt.calibration.reference import Reference
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.model import DenseWeight, QuantTensors, QuantWeight
from llmopt.optimizer.scheme import PRESETS
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.weight_rounding import round_weight

IDS = torch.arange(3 * 17).reshape(3, 17) % 101
# Sums of some hundred float32 terms in another order differ by a few of their last bits.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def int8(weight, scheme="W8A8"):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return QuantWeight.of(QuantTensors((weight / scale).round().to(torch.int8), scale, None), PRESETS[scheme])


def naive_per_token(x):
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        m = row.abs().max()
        rows.append(row if m == 0 else torch.round(row / m * 127) * m / 127)
    return torch.stack(rows).reshape(x.shape)


@pytest.fixture(scope="module")
def loaded(family_of, tmp_path_factory):
    """Makes (our model, transformers' module) of a family, both read from the same files."""

    @cache
    def load(name):
        network = AutoModelForCausalLM.from_pretrained(
            family_of(name), dtype=torch.float32, attn_implementation="eager"
        ).eval()
        return load_model(str(family_of(name)), cache=tmp_path_factory.mktemp("cache")), network

    return load


def close_to(found, expected):
    """Within 2e-5 of the largest logit: sums in another order, through three layers with weights of 0.2."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max()) < 2e-5


def tokens(model, count):
    vocab = model.decoder.vocab_size
    return torch.randint(3, vocab, (2, count), generator=torch.Generator().manual_seed(1))


def test_every_family_computes_what_transformers_does(family_name, loaded):
    model, network = loaded(family_name)
    ids = tokens(model, 24)
    with torch.no_grad():
        expected = network(ids, output_hidden_states=True)
    reference = Reference(model)
    hidden = reference.embed(ids)
    assert close_to(hidden, expected.hidden_states[0])
    for index in range(model.num_layers):
        hidden = reference.layer(index, hidden)
        if index < model.num_layers - 1:  # the last one of transformers' list is normed already
            assert close_to(hidden, expected.hidden_states[index + 1])
    assert close_to(reference.head(hidden), expected.logits)


def test_every_family_decodes_what_transformers_computes_at_once(family_name, loaded):
    model, network = loaded(family_name)
    ids = tokens(model, 16)
    with torch.no_grad():
        expected = network(ids).logits
    reference, kept = Reference(model, resident=True), DynamicCache()
    assert close_to(reference.decode(ids[:, :6], kept), expected[:, 5])
    for position in range(6, 16):
        assert close_to(reference.decode(ids[:, position : position + 1], kept), expected[:, position])


@pytest.mark.parametrize("family_name", ["llama-dynamic-rope", "phi3-longrope"])
def test_a_long_sequence_leaves_no_trace_in_the_next_one(family_name, loaded, family_of):
    model, _ = loaded(family_name)
    ids = tokens(model, 90)  # rope changes beyond 64 tokens
    reference, other = Reference(model), Reference(model)  # a head run on single tokens would reset the rope
    for count in (90, 70, 64, 20):
        network = AutoModelForCausalLM.from_pretrained(family_of(family_name), dtype=torch.float32).eval()
        with torch.no_grad():
            expected = network(ids[:, :count]).logits
        assert close_to(other.head(reference.hidden_states(ids[:, :count])), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 20},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ],
    ids=["tied", "untied", "biases", "head-dim", "scaled-rope"],
)
def test_logits_are_those_of_transformers(pair_of, changes):
    model, network = pair_of(**changes)
    with torch.no_grad():
        expected = network(IDS).logits
    torch.testing.assert_close(Reference(model).logits(IDS), expected, **CLOSE)


def test_each_layer_gives_the_hidden_states_of_transformers(pair_of):
    model, network = pair_of()
    with torch.no_grad():
        expected = network(IDS, output_hidden_states=True).hidden_states
    reference = Reference(model)
    hidden = reference.embed(IDS)
    torch.testing.assert_close(hidden, expected[0])
    for index in range(model.num_layers - 1):  # the last one of transformers' list is normed already
        hidden = reference.layer(index, hidden)
        torch.testing.assert_close(hidden, expected[index + 1], **CLOSE)


def test_micro_batches_do_not_change_the_result(pair_of):
    model, network = pair_of(max_position_embeddings=1024)
    ids = torch.randint(0, 101, (3, 900), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(ids).logits
    torch.testing.assert_close(Reference(model).logits(ids), expected, **CLOSE)


def test_only_one_part_is_in_memory_at_a_time(pair_of):
    model, _ = pair_of(tie_word_embeddings=False)
    reference = Reference(model)
    hidden = reference.layer(1, reference.layer(0, reference.embed(IDS)))
    filled = {name for name, value in reference.network.named_parameters() if not value.is_meta}
    assert {name.rsplit(".layers.")[-1].split(".")[0] for name in filled} == {"1", "model"}
    reference.head(hidden)
    filled = {name for name, value in reference.network.named_parameters() if not value.is_meta}
    assert filled == {"lm_head.weight", "model.norm.weight"}


@pytest.mark.parametrize("family_name", ["gemma3", "gpt2", "falcon", "opt-350m", "mixtral"])
def test_one_layer_of_every_family_is_in_memory_at_a_time(family_name, loaded):
    model, _ = loaded(family_name)
    reference = Reference(model)
    small = {name for name, value in reference.network.named_parameters() if not value.is_meta}
    layer = model.decoder.layers[1].name
    outside = (model.decoder.positions, model.decoder.project_in, model.decoder.project_out)
    norm = model.decoder.final_norm
    expected = [*(f"{part}." for part in outside if part), *([f"{norm.name}."] if norm else [])]
    assert all(name.startswith(tuple(expected)) for name in small)
    reference.layer(1, reference.layer(0, reference.embed(tokens(model, 9))))
    filled = {name for name, value in reference.network.named_parameters() if not value.is_meta}
    below = {name for name, _ in reference.network.named_parameters() if name.startswith(f"{layer}.")}
    assert filled == small | below


def test_decoding_with_a_cache_gives_the_same_logits(pair_of):
    model, network = pair_of()
    reference, cache = Reference(model, resident=True), DynamicCache()
    with torch.no_grad():
        expected = network(IDS).logits
    torch.testing.assert_close(reference.decode(IDS[:, :5], cache), expected[:, 4], **CLOSE)
    for position in range(5, 9):
        torch.testing.assert_close(
            reference.decode(IDS[:, position : position + 1], cache), expected[:, position], **CLOSE
        )


def test_a_resident_reference_agrees_with_a_streaming_one(pair_of):
    model, _ = pair_of()
    torch.testing.assert_close(Reference(model, resident=True).logits(IDS), Reference(model).logits(IDS))


def test_weight_only_quantization_runs_on_the_values_the_integers_stand_for(pair_of):
    model, network = pair_of()
    changed = {name: int8(model.weights[name].dense(), "W8A16") for name in model.weights if "mlp" in name}
    network.load_state_dict({name: weight.dense() for name, weight in changed.items()}, strict=False)
    with torch.no_grad():
        expected = network(IDS).logits
    torch.testing.assert_close(Reference(model.with_weights(changed)).logits(IDS), expected, **CLOSE)


def test_w8a8_rounds_what_enters_each_linear_and_a_tied_table_serves_both_ends(pair_of):
    model, network = pair_of()
    changed = {model.weight_of(name): int8(model.weights[model.weight_of(name)].dense()) for name in model.linears()}
    network.load_state_dict({name: weight.dense() for name, weight in changed.items()}, strict=False)
    for name in model.linears():
        network.get_submodule(name).register_forward_pre_hook(lambda module, inputs: (naive_per_token(inputs[0]),))
    with torch.no_grad():
        expected = network(IDS).logits
    # A value within float error of a tie may round either way, which moves a logit by one activation step.
    difference = (Reference(model.with_weights(changed)).logits(IDS) - expected).abs()
    assert difference.mean() < 1e-3
    assert difference.median() < 1e-5


@pytest.mark.parametrize("family_name", ["gpt2", "falcon", "opt-350m", "gpt_neox", "phi3"])
def test_w8a8_rounds_what_enters_linears_of_every_kind(family_name, loaded):
    model, _ = loaded(family_name)
    changed = {model.weight_of(name): int8(model.weights[model.weight_of(name)].dense()) for name in model.linears()}
    quantized = Reference(model.with_weights(changed))
    rounded = {name: Rounded(quantized.network, name) for name in model.linears()}
    quantized.logits(tokens(model, 9))
    for name, linear in rounded.items():
        weight = changed[model.weight_of(name)].dense()
        bias = model.weights.get(f"{name}.bias")
        expected = naive_per_token(linear.entered) @ weight.T + (0 if bias is None else bias.dense())
        torch.testing.assert_close(linear.left, expected, rtol=1e-4, atol=1e-4)


class Rounded:
    """What entered and left one of transformers' linears, hooked before and behind everything else."""

    def __init__(self, network, name):
        names = {"embed_out": "lm_head"}
        module = network.get_submodule(names.get(name, name))
        module.register_forward_pre_hook(self.keep_entered, prepend=True)
        module.register_forward_hook(self.keep_left)

    def keep_entered(self, module, inputs):
        self.entered = inputs[0]

    def keep_left(self, module, inputs, output):
        self.left = output.clone()  # Falcon adds to it in place


@pytest.mark.parametrize("family_name", ["mixtral", "qwen3_moe"])
def test_experts_with_quantized_weights_compute_with_what_the_integers_stand_for(family_name, loaded):
    model, _ = loaded(family_name)
    names = [model.weight_of(name) for name in model.linears() if ".experts." in name]
    changed = {name: int8(model.weights[name].dense(), "W8A16") for name in names}
    dense = {name: DenseWeight.of(weight.dense()) for name, weight in changed.items()}
    ids = tokens(model, 9)
    found = Reference(model.with_weights(changed)).logits(ids)
    assert torch.equal(found, Reference(model.with_weights(dense)).logits(ids))
    assert not close_to(found, Reference(model).logits(ids))


@pytest.mark.parametrize("scheme", ["W8A8", "W8A16"])
@pytest.mark.parametrize("family_name", ["llama", "gpt2", "mixtral", "phi3"])
def test_an_updated_layer_computes_as_a_model_that_had_these_weights_from_the_start(family_name, scheme, loaded):
    model, _ = loaded(family_name)
    layer = model.decoder.layers[1]
    linears = layer.attention.linears if scheme == "W8A8" else layer.linears
    first, rest = ({f"{m}.weight": int8(model.weights[f"{m}.weight"].dense(), scheme) for m in part}
                   for part in (linears[:1], linears[1:]))  # fmt: skip
    reference = Reference(model)
    hidden = reference.layer(0, reference.embed(IDS))
    before = reference.layer(1, hidden)
    for weights in (first, first, rest):  # also a second time, and while the layer is in memory
        reference.update(weights)
        found = reference.layer(1, hidden)
    expected = Reference(model.with_weights(first | rest)).layer(1, hidden)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, before, **CLOSE)
    assert torch.equal(reference.logits(IDS), Reference(model.with_weights(first | rest)).logits(IDS))


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_inputs_are_rounded_in_bfloat16_too(scheme, pair_of):
    model, _ = pair_of()
    name = "model.layers.2.mlp.down_proj.weight"
    rounded, _ = round_weight(name, model.weights[name], PRESETS[scheme], torch.tensor(8.0))
    exact, found = (
        Reference(model.with_weights({name: rounded}), dtype=dtype).logits(IDS)
        for dtype in (torch.float32, torch.bfloat16)
    )
    plain, in_bfloat16 = (Reference(model, dtype=dtype).logits(IDS) for dtype in (torch.float32, torch.bfloat16))
    assert found.dtype == torch.bfloat16
    # What bfloat16 loses without any quantization; inputs beside a border of two steps add to it.
    assert (found - exact).norm() < 1.5 * (in_bfloat16 - plain).norm()


def test_inputs_in_bfloat16_get_the_integers_that_their_values_have_in_float32(pair_of):
    model, _ = pair_of()
    name = "model.layers.2.mlp.down_proj.weight"
    rounded, _ = round_weight(name, model.weights[name], PRESETS["W8A8"])
    reference = Reference(model.with_weights({name: rounded}), dtype=torch.bfloat16, resident=True)
    down, entered, seen = reference.module(name.removesuffix(".weight")), [], []
    down.register_forward_pre_hook(lambda _, x: entered.append(x[0].clone()), prepend=True)
    down.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    reference.logits(IDS)
    expected = torch.cat([quantize_per_token(x.float()).to(torch.bfloat16) for x in entered])
    assert torch.equal(torch.cat(seen), expected)


def test_experts_with_quantized_inputs_are_refused(loaded):
    model, _ = loaded("mixtral")
    name = "model.layers.1.block_sparse_moe.experts.2.w1"
    changed = {f"{name}.weight": int8(model.weights[f"{name}.weight"].dense())}
    with pytest.raises(UnsupportedError, match=f"{name} is an expert with quantized inputs"):
        Reference(model.with_weights(changed))


def test_the_model_is_left_alone(pair_of):
    model, _ = pair_of()
    before = {name: weight.dense().clone() for name, weight in model.weights.items()}
    Reference(model).logits(IDS)
    assert all(torch.equal(model.weights[name].dense(), value) for name, value in before.items())


def test_the_number_of_threads_is_put_back(pair_of):
    model, _ = pair_of()
    before = torch.get_num_threads()
    Reference(model, threads=before + 1).logits(IDS)
    assert torch.get_num_threads() == before


def test_a_missing_weight_is_named(pair_of):
    model, _ = pair_of()
    name = "model.layers.1.mlp.up_proj.weight"
    weights = {key: value for key, value in model.weights.items() if key != name}
    reference = Reference(type(model)(model.arch, model.config, weights, model.source))
    with pytest.raises(InputError, match=name):
        reference.logits(IDS)


def test_a_weight_of_another_shape_is_named(pair_of):
    model, _ = pair_of()
    name = "model.norm.weight"
    with pytest.raises(InputError, match=r"model.norm.weight has shape \[7\], config.json asks for \[48\]"):
        Reference(model.with_weights({name: DenseWeight.of(torch.ones(7))}))


def test_an_unknown_model_type_is_refused(pair_of):
    model, _ = pair_of()
    config = {**model.config, "model_type": "lllama"}
    with pytest.raises(UnsupportedError, match="lllama"):
        Reference(type(model)(model.arch, config, model.weights, model.source))
