"""Going through the layers: what each stage sees, and what a build that was killed leaves for the next."""

import gc
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from llmopt.calibration.quantize_layers import Plan, quantize_layers
from llmopt.calibration.reference import Reference
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.model import DenseWeight
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens

IDS = torch.arange(4 * 9).reshape(4, 9) * 5 % 101


@pytest.fixture
def model(pair_of):
    return pair_of()[0]


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Computes in float32, so that results can be compared closely."""
    monkeypatch.setattr("llmopt.calibration.layerwise.fast_dtype", lambda: torch.float32)
    tokens = Tokens(name="it", ids=IDS, digest="0")
    return PassContext(calibration=lambda: tokens, work=tmp_path / "work")


class Halving:
    """Halves every weight, and writes down what entered its linears."""

    def __init__(self, model, *, until=None):
        self.model = model
        self.until = until
        self.seen: dict[str, torch.Tensor] = {}
        self.exact: dict[str, torch.Tensor] = {}
        self.stages: list[tuple[tuple[str, ...], ...]] = []

    def __call__(self, stage):
        self.stages.append(stage.readers)
        modules = [module for readers in stage.readers for module in readers]
        if self.until in modules:
            raise KeyboardInterrupt
        seen, exact = {}, {}
        if stage.is_paired:
            stage.observe_both(lambda module, rows, other: (seen.setdefault(module, []).append(rows),
                                                            exact.setdefault(module, []).append(other)))  # fmt: skip
        else:
            stage.observe(lambda module, rows: seen.setdefault(module, []).append(rows))
        self.seen |= {module: torch.cat(rows) for module, rows in seen.items()}
        self.exact |= {module: torch.cat(rows) for module, rows in exact.items()}
        weights = {f"{module}.weight": self.model.weights[f"{module}.weight"].dense() / 2 for module in modules}
        return {k: DenseWeight.of(v) for k, v in weights.items()}, {module: {"errors": 0.5} for module in modules}


def inputs(model, modules):
    """What enters linears when the whole model runs."""
    reference, found = Reference(model, resident=True), {}

    def keep(module, _, given):
        found[module] = given[0].flatten(0, -2)

    for module in modules:
        reference.module(module).register_forward_pre_hook(partial(keep, module))
    reference.hidden_states(IDS)
    return found


def assert_same(found, expected):
    for module, rows in found.items():
        torch.testing.assert_close(rows, expected[module], rtol=1e-4, atol=1e-5)


def halved(model, modules):
    return {f"{m}.weight": DenseWeight.of(model.weights[f"{m}.weight"].dense() / 2) for m in modules}


def test_each_stage_sees_the_model_with_all_stages_before_it_quantized(model, context) -> None:
    linears = model.linears()[:-1]
    quantize = Halving(model)
    weights, facts = quantize_layers(model, Plan(modules=linears, twin=True), context, quantize)
    assert [len(stage[0]) for stage in quantize.stages] == [3, 1, 2, 1] * model.num_layers
    assert facts == {module: {"errors": 0.5} for module in linears}
    for stage in quantize.stages:
        (readers,) = stage
        before = linears[: linears.index(readers[0])]
        expected = inputs(model.with_weights(halved(model, before)), [readers[0]])
        assert_same({readers[0]: quantize.seen[readers[0]]}, expected)
    assert_same(quantize.exact, inputs(model, quantize.exact))
    assert weights.keys() == {f"{module}.weight" for module in linears}


def test_without_true_sequential_a_layer_is_one_stage(model, context) -> None:
    linears = model.linears()[:-1]
    quantize = Halving(model)
    quantize_layers(model, Plan(modules=linears, true_sequential=False, twin=True), context, quantize)
    assert len(quantize.stages) == model.num_layers
    before = [module for layer in model.decoder.layers[:2] for module in layer.linears]
    expected = inputs(model.with_weights(halved(model, before)), model.decoder.layers[2].linears)
    assert_same({module: quantize.seen[module] for module in model.decoder.layers[2].linears[::3]}, expected)
    assert_same(quantize.exact, inputs(model, quantize.exact))


def test_inputs_from_the_float_model_do_not_depend_on_what_is_quantized(model, context) -> None:
    linears = model.linears()[:-1]
    quantize = Halving(model)
    quantize_layers(model, Plan(modules=linears, follow=False), context, quantize)
    assert_same(quantize.seen, inputs(model, quantize.seen))


def test_linears_that_are_left_alone_are_no_stage(model, context) -> None:
    wanted = [model.decoder.layers[1].mlp.down, model.decoder.layers[1].attention.key]
    quantize = Halving(model)
    weights, _ = quantize_layers(model, Plan(modules=wanted, twin=True), context, quantize)
    assert quantize.stages == [((wanted[1],),), ((wanted[0],),)]
    assert weights.keys() == {f"{module}.weight" for module in wanted}


@pytest.mark.parametrize("twin", [False, True])
@pytest.mark.parametrize("follow", [False, True])
def test_a_killed_run_goes_on_at_the_layer_it_was_in(model, context, tmp_path: Path, twin, follow) -> None:
    linears = model.linears()[:-1]
    plan = Plan(modules=linears, twin=twin, follow=follow)
    whole = Halving(model)
    expected = quantize_layers(model, plan, replace(context, work=tmp_path / "another"), whole)
    with pytest.raises(KeyboardInterrupt):
        quantize_layers(model, plan, context, Halving(model, until=model.decoder.layers[1].mlp.down))
    rest, details = Halving(model), {}
    weights, facts = quantize_layers(model, plan, replace(context, detail=details.__setitem__), rest)
    assert details["coverage"]["modules"] == {"count": len(linears), "tokens": IDS.numel()}
    assert len(rest.stages) == 8
    for module, rows in rest.seen.items():
        assert torch.equal(rows, whole.seen[module])
    for module, rows in rest.exact.items():
        assert torch.equal(rows, whole.exact[module])
    assert facts == expected[1]
    for name, weight in expected[0].items():
        assert torch.equal(weights[name].dense(), weight.dense())


def test_what_is_never_activated_is_told_by_a_run_that_goes_on_too(model, context) -> None:
    linears, told = model.linears()[:-1], []
    dead = model.decoder.layers[0].mlp.down

    def quantize(halving, stage):
        weights, facts = halving(stage)
        return weights, {name: {**about, "unreached": name == dead} for name, about in facts.items()}

    stopped = Halving(model, until=model.decoder.layers[1].mlp.down)
    with pytest.raises(KeyboardInterrupt):
        quantize_layers(model, Plan(modules=linears), context, partial(quantize, stopped))
    context = replace(context, fallback=told.append)
    _, facts = quantize_layers(model, Plan(modules=linears), context, partial(quantize, Halving(model)))
    assert told == [f"no calibration token activates {dead}: it is rounded to nearest"]
    assert facts[dead] == {"errors": 0.5}


def test_where_a_layer_is_one_stage_experts_are_another_if_others_see_the_float_model(
    family_of, context, tmp_path: Path
) -> None:
    model = load_model(str(family_of("mixtral")), cache=tmp_path)
    quantize, linears = Halving(model), model.linears()[:-1]
    quantize_layers(model, Plan(modules=linears, true_sequential=False, twin=True), context, quantize)
    mlp = model.decoder.layers[0].mlp
    assert quantize.stages[1] == (*(e[:2] for e in mlp.experts), *(e[2:] for e in mlp.experts))
    assert len(quantize.stages) == 2 * model.num_layers
    assert quantize.exact.keys() == {readers[0] for stage in quantize.stages[::2] for readers in stage}
    assert model.decoder.expert_linears.isdisjoint(quantize.exact)
    assert_same(quantize.exact, inputs(model, quantize.exact))


def test_experts_are_shown_a_few_at_a_time_where_their_moments_are_large(
    family_of, context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(family_of("mixtral")), cache=tmp_path)
    plan = Plan(modules=model.linears()[:-1], true_sequential=False, divisible=True)
    whole, divided = Halving(model), Halving(model)
    quantize_layers(model, plan, replace(context, work=None), whole)
    mlp = model.decoder.layers[0].mlp
    widths = [model.weights[f"{linear}.weight"].shape[1] for linear in (mlp.experts[0][0], mlp.experts[0][2])]
    monkeypatch.setattr("llmopt.calibration.quantize_layers._MOMENTS_BYTES", 8 * 2 * widths[0] ** 2)
    quantize_layers(model, plan, replace(context, work=None), divided)
    assert len(whole.stages) == 2 * model.num_layers
    assert divided.stages[1:3] == [tuple(e[:2] for e in mlp.experts[n : n + 2]) for n in (0, 2)]
    # Parts see the same rows: weights are taken over behind the last of them.
    assert divided.seen.keys() == whole.seen.keys()
    for module, rows in divided.seen.items():
        assert torch.equal(rows, whole.seen[module])


def test_experts_are_stages_of_their_own_rows(family_of, context, tmp_path: Path) -> None:
    model = load_model(str(family_of("mixtral")), cache=tmp_path)
    quantize, details = Halving(model), {}
    context = replace(context, detail=details.__setitem__)
    quantize_layers(model, Plan(modules=model.linears()[:-1], twin=True), context, quantize)
    mlp = model.decoder.layers[0].mlp
    reached = [len(quantize.seen[expert[0]]) for expert in mlp.experts]
    assert details["coverage"]["experts"][model.decoder.layers[0].name] == reached
    assert quantize.stages[2:4] == [tuple(e[:2] for e in mlp.experts), tuple(e[2:] for e in mlp.experts)]
    assert mlp.experts[0][0] not in quantize.exact
    assert sum(reached) == IDS.numel() * mlp.top_k


def live_bytes() -> int:
    """Of all tensors that Python can reach, but for those without memory that torch's tracing leaves behind."""
    gc.collect()
    plain = (torch.Tensor, torch.nn.Parameter)
    made = [each for each in gc.get_objects() if type(each) in plain and not each.is_meta]
    tensors = [each for each in made if not torch._is_functional_tensor(each)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def test_a_layer_s_memory_is_given_back_before_the_next(pair_of, context) -> None:
    model = pair_of(num_hidden_layers=8)[0]
    live: dict[int, list[int]] = {}

    def halve(stage):
        rows = []
        stage.observe_both(lambda module, working, exact: rows.append((working, exact)))
        live.setdefault(stage.index, []).append(live_bytes())
        return halved(model, [module for readers in stage.readers for module in readers]), {}

    quantize_layers(model, Plan(modules=model.linears()[:-1], twin=True), context, halve)
    of_layer = 4 * sum(model.weights[name].load().numel() for name in model.weights if ".layers.1." in name)
    assert len(live) == 8
    # Layer by layer the same: what is left of one that is done would be a good part of its weights.
    assert all(abs(max(each) - max(live[1])) < 0.05 * of_layer for index, each in live.items() if index)
