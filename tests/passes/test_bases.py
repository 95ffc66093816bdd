"""Every pass that changes linears but not the function records how: its weights follow from the checkpoint's."""

import pytest
import torch

from llmopt.optimizer.model import DenseWeight
from llmopt.passes.awq import Awq
from llmopt.passes.rescale import Rescale
from llmopt.passes.rotate import Rotate
from llmopt.passes.smoothquant import Smoothquant

PASSES = {
    "rotate": Rotate(),
    "rotate heads": Rotate(residual=False),
    "rotate online": Rotate(online={"down_proj": 32}),
    "rescale": Rescale(),
    "smoothquant": Smoothquant(pairs=("norm", "value", "up")),
    "awq": Awq(scheme="W4A16", group_size=16, rounds=False),
}
FAMILIES = ["llama", "llama-linear-rope", "qwen3", "gpt2", "phi3", "falcon-40b", "opt-350m", "mixtral", "qwen3_moe"]


def takes(one, model) -> bool:
    """Experts have no online rotation; OPT-350m's norms stand behind its branches."""
    if isinstance(one, Rotate) and one.residual and model.decoder.name == "opt":
        return False
    return not (isinstance(one, Rotate) and one.online and model.decoder.expert_linears)


def linears(model):
    """Every module whose weight an adapter may change, with its name."""
    routers = [layer.mlp.router for layer in model.decoder.layers if hasattr(layer.mlp, "router")]
    outside = [model.decoder.embedding, model.decoder.project_in, model.decoder.project_out]
    return [name for name in (*model.linears(), *routers, *outside) if name is not None]


def as_recorded(source, model, module):
    """Weight and bias of ``module``: the checkpoint's, changed as ``model`` says they were."""
    bias = source.weights.get(f"{module}.bias")
    weight = source.weights[source.weight_of(module)].dense().double()
    return model.bases[module].linear(weight, None if bias is None else bias.dense().double())


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_checkpoints_in_the_recorded_basis(model_of, context, family, name) -> None:
    source = model_of(family)
    if not takes(PASSES[name], source):
        pytest.skip("the pass does not take this family")
    model = PASSES[name].run(source, context[0])
    assert not source.bases
    for module in linears(model):
        weight = model.weights[model.weight_of(module)]
        if weight is source.weights[source.weight_of(module)]:
            assert module not in model.bases or model.is_tied
            continue
        expected, bias = as_recorded(source, model, module)
        # Float32 of the last step; scales are moved in float32 as well.
        torch.testing.assert_close(weight.dense(), expected.float(), rtol=1e-5, atol=1e-6)
        if bias is not None:
            torch.testing.assert_close(model.weights[f"{module}.bias"].dense(), bias.float(), rtol=1e-5, atol=1e-6)


def test_passes_behind_each_other_add_up(model_of, context) -> None:
    source = model_of("llama")
    model = source
    for one in (Rescale(), PASSES["smoothquant"], PASSES["rotate online"]):
        model = one.run(model, context[0])
    for module in model.linears():
        expected, _ = as_recorded(source, model, module)
        torch.testing.assert_close(model.weights[f"{module}.weight"].dense(), expected.float(), rtol=1e-5, atol=1e-5)


def test_a_quantizer_that_moves_scales_records_them_too(model_of, context) -> None:
    source = model_of("llama")
    model = Awq(scheme="W8A16", clipping="none").run(source, context[0])
    assert model.bases.keys() > {"model.layers.0.mlp.down_proj"}
    for module in model.bases:
        expected, _ = as_recorded(source, model, module)
        found = model.weights[f"{module}.weight"]
        assert not isinstance(found, DenseWeight)
        assert (found.dense() - expected).norm() < 0.01 * expected.norm()  # 8 bits lose less


def test_scales_that_a_killed_awq_had_moved_are_recorded_when_it_goes_on(model_of, context, tmp_path) -> None:
    from dataclasses import replace

    source, handed = model_of("llama"), replace(context[0], work=tmp_path)
    found = [PASSES["awq"].run(source, handed) for _ in range(2)]
    module = "model.layers.1.mlp.up_proj"
    weight = source.weights[f"{module}.weight"].dense().double()
    assert torch.equal(*(each.bases[module].linear(weight)[0] for each in found))
