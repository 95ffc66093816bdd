"""Which schemes the cpu target runs, and why it refuses the others."""

import pytest

from llmopt.optimizer import loader
from llmopt.optimizer.scheme import PRESETS, QuantSpec, Scheme
from llmopt.optimizer.target import TARGETS

CPU, CUDA = TARGETS["cpu"], TARGETS["cuda"]
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "strategy": "tensor", "dynamic": False}


def scheme(activations=None, **weights):
    settings = {"num_bits": 8, "strategy": "channel"} | weights
    return Scheme(weights=QuantSpec(**settings), input_activations=QuantSpec(**activations) if activations else None)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs(name):
    assert CPU.refusal(PRESETS[name]) is None


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [-1, 16, 32, 48, 64, 96, 128, 192])
def test_weight_only_runs_in_groups_of_any_multiple_of_16(bits, size, symmetric):
    assert CPU.refusal(scheme(num_bits=bits, symmetric=symmetric).with_group_size(size)) is None


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        (scheme(strategy="block", block_structure=(128, 128)), "per tensor, per channel or per group"),
        (scheme(strategy="token"), "per tensor, per channel or per group"),
        (scheme(TOKEN, type="float"), "rounds activations to FP8"),
        (scheme(STATIC, type="float"), "rounds activations to FP8"),
        (scheme(STATIC | {"type": "float", "dynamic": True}, type="float"), "rounds activations to FP8"),
        (scheme(TOKEN | {"type": "float", "dynamic": False}, type="float"), "rounds activations to FP8"),
        (scheme(strategy="group", group_size=8), "multiple of 16, not 8"),
        (scheme(strategy="group", group_size=40), "multiple of 16, not 40"),
        (scheme(TOKEN | {"dynamic": False}), "symmetric int8, dynamic per token"),
        (scheme(TOKEN | {"symmetric": False}), "symmetric int8, dynamic per token"),
        (scheme(STATIC | {"dynamic": True}), "symmetric int8, dynamic per token"),
        (scheme(TOKEN | {"num_bits": 4}), "symmetric int8, dynamic per token"),
        (scheme(TOKEN | {"type": "float"}), "symmetric int8, dynamic per token"),
        (scheme(TOKEN, num_bits=4), "symmetric int8 weights with one scale per channel or tensor"),
        (scheme(TOKEN, symmetric=False), "symmetric int8 weights with one scale per channel or tensor"),
        (scheme(TOKEN, strategy="group", group_size=32), "symmetric int8 weights with one scale per channel or tensor"),
    ],
)
def test_what_has_no_kernel_is_refused_with_the_reason(refused, why):
    assert why in CPU.refusal(refused)


@pytest.mark.parametrize("name", PRESETS)
def test_experts_run_every_preset_that_leaves_activations(name):
    refused = CPU.refusal(PRESETS[name], experts=True)
    if PRESETS[name].input_activations is None:
        assert refused is None
    else:
        assert refused == (
            "the cpu target has no kernel for experts that quantizes activations; W8A16 and W4A16 leave them"
        )


def test_experts_run_no_scheme_that_linears_do_not():
    refused = scheme(strategy="group", group_size=40)
    assert CPU.refusal(refused, experts=True) == CPU.refusal(refused)


def test_experts_do_not_run_fp8():
    assert CPU.refusal(scheme(type="float"), experts=True) == "the cpu target has no FP8 experts"


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_int8_inputs_may_have_a_stored_scale(strategy):
    assert CPU.refusal(scheme(STATIC, strategy=strategy)) is None


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_a_target_is_found_by_its_name_and_its_graph_passes_exist_once(target):
    assert TARGETS[target.name] is target
    assert set(target.graph_passes) <= set(loader.names("passes.graph"))
    assert len(set(target.graph_passes)) == len(target.graph_passes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [-1, 16, 32, 64, 128, 192])
def test_cuda_runs_weights_of_4_and_8_bits(bits, size, symmetric):
    assert CUDA.refusal(scheme(num_bits=bits, symmetric=symmetric).with_group_size(size)) is None


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        (scheme(TOKEN), "no kernel that multiplies rounded activations"),
        (scheme(STATIC), "no kernel that multiplies rounded activations"),
        (PRESETS["FP8"], "no kernel that multiplies rounded activations"),
        (scheme(type="float"), "no kernel for FP8 weights"),
        (scheme(num_bits=2), "weights of 4 and 8 bits, not 2"),
        (scheme(num_bits=3), "weights of 4 and 8 bits, not 3"),
        (scheme(strategy="block", block_structure=(128, 128)), "per tensor, per channel or per group"),
        (scheme(strategy="group", group_size=40), "multiple of 16, not 40"),
    ],
)
def test_what_cuda_has_no_kernel_for_is_refused_with_the_reason(refused, why):
    assert why in CUDA.refusal(refused)


def test_cuda_has_no_experts():
    assert CUDA.refusal(PRESETS["W8A16"], experts=True) == "the cuda target has no mixtures of experts"
