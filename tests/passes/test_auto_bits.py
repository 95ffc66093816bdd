"""The choice of schemes by sensitivity: what it spends, what it loses, what it records, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from llmopt.calibration import sensitivity
from llmopt.calibration.divergence import kl_divergence
from llmopt.calibration.reference import Reference
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import DenseWeight, QuantWeight
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens
from llmopt.passes import _budget, auto_bits
from llmopt.passes._cost import checkpoint_bits, engine_bytes, other_engine_bytes
from llmopt.passes.auto_bits import AutoBits
from llmopt.passes.gptq import Gptq
from llmopt.passes.round_to_nearest import RoundToNearest

IDS = torch.randint(3, 500, (16, 24), generator=torch.Generator().manual_seed(0))
CANDIDATES = [{"scheme": "W4A16", "group_size": 64}, {"scheme": "W4A16", "group_size": 16}, "W8A16"]
METHOD = "round_to_nearest"


@pytest.fixture
def recorded():
    """A context, and the details and notes that it collects."""
    details, notes = {}, []
    tokens = Tokens(name="it", ids=IDS, digest="0")
    context = PassContext(calibration=lambda: tokens, detail=details.__setitem__, note=notes.append)
    return context, details, notes


@pytest.fixture
def model(float_model_of):
    return float_model_of()


def bits_of(model) -> float:
    """Average bits of the decoder's linears."""
    weights = [model.weights[model.weight_of(module)] for module in model.linears()[:-1]]
    schemes = [weight.scheme if isinstance(weight, QuantWeight) else None for weight in weights]
    total = sum(checkpoint_bits(weight.shape, scheme) for weight, scheme in zip(weights, schemes, strict=True))
    return total / sum(weight.shape[0] * weight.shape[1] for weight in weights)


def loss(model, quantized) -> float:
    """KL divergence on the text that sensitivities were measured on."""
    source, found = (Reference(each).logits(IDS).flatten(0, 1) for each in (model, quantized))
    return float(kl_divergence(source, found).mean())


def schemes_of(model) -> dict[str, str]:
    weights = {module: model.weights[model.weight_of(module)] for module in model.linears()[:-1]}
    return {name: w.scheme.name if isinstance(w, QuantWeight) else "none" for name, w in weights.items()}


@pytest.mark.parametrize("bits", [4.5, 5, 6.5])
def test_bits_are_spent_and_lose_less_than_one_scheme_of_that_size(model, recorded, bits) -> None:
    found = AutoBits(budget={"bits": bits}, candidates=CANDIDATES, method=METHOD, head="none").run(model, recorded[0])
    assert 0.97 * bits < bits_of(found) <= bits
    uniform = RoundToNearest(scheme="W4A16", group_size=16 if bits >= 5 else 32, head="none").run(model, recorded[0])
    assert loss(model, found) < loss(model, uniform)
    # Sensitivities of small changes add up, nearly: what is measured together includes how they interact.
    assert loss(model, found) == pytest.approx(recorded[1]["predicted_kl"], rel=0.5)


def test_packed_linears_share_a_scheme_unless_each_is_asked_for(model, recorded) -> None:
    options = {"budget": {"bits": 5.5}, "candidates": CANDIDATES, "method": METHOD}
    found = schemes_of(AutoBits(**options).run(model, recorded[0]))
    for layer in range(3):
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({found[f"model.layers.{layer}.{name}"] for name in names}) == 1
    assert len(recorded[1]["sensitivities"]) == 12
    AutoBits(**options, group="linear").run(model, recorded[0])
    assert len(recorded[1]["sensitivities"]) == 21
    assert recorded[1]["predicted_kl"] > 0


def test_bytes_are_those_of_the_whole_engine(model, recorded) -> None:
    limit = 150_000
    found = AutoBits(budget={"bytes": limit}, candidates=CANDIDATES, method=METHOD, head="W8A16").run(
        model, recorded[0]
    )
    weights = [found.weights[found.weight_of(module)] for module in found.linears()]
    total = sum(engine_bytes(w.shape, w.scheme) for w in weights[:-1]) + other_engine_bytes(model, weights[-1].scheme)
    assert 0.95 * limit < total <= limit


def test_milliseconds_are_measured_once_for_each_shape(model, recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def time_of(shape, scheme, *, threads):
        measured.append((shape, scheme.name))
        return shape[0] * shape[1] * scheme.weights.num_bits / 1e6

    monkeypatch.setattr(_budget, "linear_milliseconds", time_of)
    total = sum(rows * columns for rows, columns in (model.weights[f"{m}.weight"].shape for m in model.linears()[:-1]))
    budget = {"milliseconds": total * 6 / 1e6}
    found = AutoBits(budget=budget, candidates=["W4A16", "W8A16"], method=METHOD, head="none")
    with pytest.raises(PassError, match="group_size=128"):
        found.requires(model)
    candidates = [{"scheme": "W4A16", "group_size": 32}, "W8A16"]
    found = schemes_of(AutoBits(budget=budget, candidates=candidates, method=METHOD).run(model, recorded[0]))
    assert {"W4A16 g32", "W8A16"} == set(found.values())
    assert len(measured) == len(set(measured)) == 2 * 4
    assert recorded[1]["milliseconds"]["128x64"] == pytest.approx({"W4A16 g32": 0.032768, "W8A16": 0.065536})
    assert any("another one may choose otherwise" in note for note in recorded[2])


def test_a_killed_build_goes_on_with_the_times_it_measured(model, recorded, tmp_path: Path, monkeypatch) -> None:
    factor = {"W4A16 g32": 1, "W8A16": 2}
    monkeypatch.setattr(_budget, "linear_milliseconds", lambda _, scheme, *, threads: factor[scheme.name])
    options = {"candidates": [{"scheme": "W4A16", "group_size": 32}, "W8A16"], "budget": {"milliseconds": 31}}
    context = replace(recorded[0], work=tmp_path)
    expected = schemes_of(AutoBits(**options, method=METHOD).run(model, recorded[0]))
    monkeypatch.setattr(sensitivity, "Reference", interrupted)
    with pytest.raises(KeyboardInterrupt):
        AutoBits(**options, method=METHOD).run(model, context)
    monkeypatch.undo()
    monkeypatch.setattr(_budget, "linear_milliseconds", lambda *_, **__: pytest.fail("measured again"))
    assert schemes_of(AutoBits(**options, method=METHOD).run(model, context)) == expected
    assert set(expected.values()) == {"W4A16 g32", "W8A16"}


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_result_depends_on_the_file_that_defines_the_method() -> None:
    (file,) = AutoBits(budget={"bits": 5}, candidates=CANDIDATES, method="gptq").files
    assert file.name == "gptq.py"


def test_the_method_quantizes_with_its_own_options(model, recorded) -> None:
    options = {"budget": {"bits": 5}, "candidates": CANDIDATES, "head": "none"}
    found = AutoBits(**options, method={"gptq": {"damping": 0.5}}).run(model, recorded[0])
    chosen = schemes_of(found)
    sizes = {"W4A16 g64": ("W4A16", 64), "W4A16 g16": ("W4A16", 16), "W8A16": ("W8A16", None)}
    overrides = []
    for module, name in chosen.items():
        scheme = AutoBits(**options, method=METHOD).candidates[list(sizes).index(name)].sized
        overrides.append({"match": module, "scheme": scheme})
    expected = Gptq(scheme="W8A16", damping=0.5, head="none", overrides=overrides).run(model, recorded[0])
    assert all(torch.equal(found.weights[name].dense(), expected.weights[name].dense()) for name in model.weights)
    assert "output_errors" in recorded[1]


def test_overrides_are_fixed_before_the_search_and_count(model, recorded) -> None:
    overrides = [
        {"match": "model.layers.0.mlp.down_proj", "scheme": "none"},
        {"match": "re:.*down_proj", "scheme": "W8A16"},
    ]
    options = {"candidates": CANDIDATES, "method": METHOD, "overrides": overrides}
    found = AutoBits(budget={"bits": 6.5}, **options).run(model, recorded[0])
    names = schemes_of(found)
    assert [names[f"model.layers.{i}.mlp.down_proj"] for i in range(3)] == ["none", "W8A16", "W8A16"]
    assert 6 < bits_of(found) <= 6.5
    assert not any("down_proj" in name for name in recorded[1]["sensitivities"])
    with pytest.raises(PassError, match=r"5\.000 bits cannot be reached: .* need 5\.\d+ bits at least"):
        AutoBits(budget={"bits": 5}, **options).requires(model)


def test_the_table_goes_from_the_smallest_budget_to_the_largest_and_marks_the_choice(model, recorded) -> None:
    AutoBits(budget={"bits": 5}, candidates=CANDIDATES, method=METHOD).run(model, recorded[0])
    rows = recorded[1]["pareto"]
    assert rows[0]["shares"] == {"W4A16 g64": 1}
    assert rows[0]["bits"] == pytest.approx(4.25)
    assert rows[-1]["shares"] == {"W8A16": 1}
    assert [row["kl"] for row in rows] == sorted((row["kl"] for row in rows), reverse=True)
    (chosen,) = [row for row in rows if row.get("chosen")]
    assert chosen["kl"] == recorded[1]["predicted_kl"]
    assert chosen["bits"] <= 5
    lines = [note for note in recorded[2] if "predicted KL" in note]
    assert len(lines) == len(rows)
    assert sum(line.endswith("(chosen)") for line in lines) == 1
    assert lines[0].startswith("4.250 bits: predicted KL ")
    assert lines[0].endswith("; 100% W4A16 g64")


def test_another_budget_measures_nothing_again(model, recorded, tmp_path: Path, monkeypatch) -> None:
    from dataclasses import replace

    context = replace(recorded[0], shared=lambda *what: tmp_path)
    AutoBits(budget={"bits": 5}, candidates=CANDIDATES, method=METHOD).run(model, context)
    monkeypatch.setattr(sensitivity, "_Run", None)
    AutoBits(budget={"bits": 6}, candidates=CANDIDATES[1:], method="gptq").run(model, context)


def with_outliers(model, layer: int):
    """The same function, with one column of what enters a down projection 300 times as large as it was."""
    up, down = (f"model.layers.{layer}.mlp.{name}_proj.weight" for name in ("up", "down"))
    larger, smaller = model.weights[up].load().clone(), model.weights[down].load().clone()
    larger[5] *= 300
    smaller[:, 5] /= 300
    return model.with_weights({up: DenseWeight.of(larger), down: DenseWeight.of(smaller)})


@pytest.mark.parametrize("candidates", [["W8A8_STATIC", "none"], ["none", "W8A8_STATIC"]])
@pytest.mark.parametrize("method", ["round_to_nearest", "gptq"])
def test_what_static_scales_damage_most_stays_in_float(model, recorded, method, candidates) -> None:
    model = with_outliers(model, 1)
    options = AutoBits(budget={"bits": 9.5}, candidates=candidates, method=method)
    options.requires(model)
    found = options.run(model, recorded[0])
    names = schemes_of(found)
    assert names["model.layers.1.mlp.down_proj"] == "none"
    assert set(names.values()) == {"W8A8_STATIC", "none"}
    assert bits_of(found) <= 9.5
    (chosen,) = [row for row in recorded[1]["pareto"] if row.get("chosen")]
    assert chosen["shares"]["none"] == list(names.values()).count("none") / len(names)
    assert isinstance(found.weights[found.weight_of("lm_head")], DenseWeight)
    assert recorded[1]["pareto"][-1] == {"bits": 16, "kl": 0, "shares": {"none": 1}}


def test_static_scales_of_inputs_are_those_of_the_whole_text(model, recorded) -> None:
    module = "model.layers.1.mlp.up_proj"
    AutoBits(
        budget={"bits": 16}, candidates=["W8A8_STATIC", "none"], method=METHOD, group="linear", tokens=24, head="none"
    ).run(model, recorded[0])
    overrides = [{"match": module, "scheme": "W8A8_STATIC"}, {"match": "re:.*", "scheme": "none"}]
    one = RoundToNearest(scheme="W8A16", overrides=overrides).run(model, recorded[0])
    source, quantized = (Reference(each).logits(IDS[:1])[0] for each in (model, one))
    expected = float(kl_divergence(source, quantized).mean())
    # An input on the border of two integers may round either way when the batch is another.
    assert recorded[1]["sensitivities"][module]["W8A8_STATIC"] == pytest.approx(expected, rel=2e-2)
    assert recorded[1]["sensitivities"][module]["none"] == 0


def test_inputs_are_looked_at_once_and_only_for_static_scales(model, recorded, monkeypatch) -> None:
    looked: list[list[str]] = []
    honest = auto_bits.input_maxima
    monkeypatch.setattr(
        auto_bits,
        "input_maxima",
        lambda model, names, context, **how: looked.append(names) or honest(model, names, context, **how),
    )
    overrides = [{"match": "re:.*down_proj", "scheme": "none"}]
    options = {"method": METHOD, "overrides": overrides}
    AutoBits(budget={"bits": 10}, candidates=["W8A16", "W8A8"], **options).run(model, recorded[0])
    assert looked == []
    AutoBits(budget={"bits": 10.5}, candidates=["W8A8_STATIC", "FP8", "none"], **options).run(model, recorded[0])
    assert looked == [[name for name in model.linears()[:-1] if "down_proj" not in name]]


@pytest.mark.parametrize("method", ["round_to_nearest", "gptq"])
def test_a_budget_for_everything_in_float_leaves_it_there(model, recorded, method) -> None:
    options = AutoBits(budget={"bits": 16}, candidates=["W8A8_STATIC", "none"], method=method, head="none")
    assert set(schemes_of(options.run(model, recorded[0])).values()) == {"none"}


def test_experts_stay_in_float_where_only_that_leaves_their_inputs(family_of, tmp_path: Path) -> None:
    model = load_model(str(family_of("mixtral")), cache=tmp_path)
    options = AutoBits(budget={"bits": 16}, candidates=["W8A8_STATIC", "none"], method=METHOD)
    options.requires(model)
    possible = options.possible(model)
    assert {possible[module] for module in model.decoder.expert_linears} == {("candidates.1",)}
    assert possible["model.layers.0.self_attn.q_proj"] == ("candidates.0", "candidates.1")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "phi3", "falcon", "opt"])
def test_other_families(name, family_of, tmp_path: Path, recorded) -> None:
    model = load_model(str(family_of(name)), cache=tmp_path)
    candidates = ["W8A8", "W8A8_STATIC", "W8A16", {"scheme": "W4A16", "group_size": 16}, "none"]
    ids = Tokens(name="it", ids=IDS % 100, digest="0")
    context = PassContext(calibration=lambda: ids)
    options = AutoBits(budget={"bits": 7}, candidates=candidates, method=METHOD)
    options.requires(model)
    assert set(options.deciding(model).values()) <= {*options.schemes(), "head"}
    found = options.run(model, context)
    assert bits_of(found) <= 7
    assert {
        w.scheme.input_activations for m in model.decoder.expert_linears for w in [found.weights[f"{m}.weight"]]
    } <= {None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {}}, "exactly one of bits, bytes and milliseconds"),
        ({"budget": {"bits": 4.5, "bytes": 10}}, "exactly one of bits, bytes and milliseconds"),
        ({"budget": {"bits": 0}}, "greater than 0"),
        ({"candidates": ["W8A16"]}, "at least 2"),
        ({"candidates": ["W8A16", "W8A16"]}, "W8A16 is given twice"),
        ({"candidates": ["W8A16", "W5A16"]}, "unknown scheme 'W5A16'"),
        ({"candidates": ["W8A16", "none", "none"]}, "none is given twice"),
        ({"candidates": ["none", "none"]}, "none is given twice"),
        ({"candidates": ["W8A16", {"scheme": "none", "group_size": 32}]}, "group_size does not go with none"),
        ({"candidates": ["W8A16", {"scheme": "W8A8", "group_size": 32}]}, "does not go with quantized activations"),
        ({"method": "gtpq"}, "no pass named 'gtpq'; did you mean 'gptq'"),
        ({"method": "rotate"}, "rotate is no pass that quantizes by schemes"),
        ({"method": "auto_bits"}, "auto_bits is no pass that quantizes by schemes"),
        ({"method": {"gptq": {"dampin": 1}}}, r"gptq\.dampin: unknown option 'dampin'; did you mean 'damping'"),
        ({"method": {"gptq": {"damping": 5}}}, r"gptq\.damping: must be at most 1"),
        ({"method": {"gptq": {"group_size": 32}}}, r"gptq\.group_size is chosen by auto_bits"),
        ({"method": {"gptq": {}, "round_to_nearest": {}}}, "method names one quantizing pass"),
    ],
)
def test_wrong_options_are_named(changes, message) -> None:
    usual = {"budget": {"bits": 5}, "candidates": CANDIDATES, "method": METHOD}
    with pytest.raises(ValidationError, match=message):
        AutoBits(**(usual | changes))


def test_a_budget_that_cannot_be_reached_names_the_smallest(model) -> None:
    options = {"candidates": CANDIDATES, "method": METHOD}
    with pytest.raises(PassError, match=r"4\.000 bits cannot be reached: .* need 4\.250 bits at least"):
        AutoBits(budget={"bits": 4}, **options).requires(model)
    with pytest.raises(PassError, match=r"0\.05 MB cannot be reached: .* need 0\.\d\d MB at least"):
        AutoBits(budget={"bytes": 50_000}, **options).requires(model)


def test_a_method_that_leaves_floats_is_refused(model) -> None:
    one = AutoBits(budget={"bits": 5}, candidates=CANDIDATES, method={"awq": {"rounds": False}})
    with pytest.raises(PassError, match="method only prepares weights"):
        one.requires(model)
    AutoBits(budget={"bits": 5}, candidates=CANDIDATES, method="awq").requires(model)


def test_overrides_of_everything_leave_nothing_to_choose(model) -> None:
    overrides = [{"match": "re:.*", "scheme": "W8A16"}]
    with pytest.raises(PassError, match="overrides decide about every linear"):
        AutoBits(budget={"bits": 9}, candidates=CANDIDATES, method=METHOD, overrides=overrides).requires(model)


def test_experts_need_a_candidate_that_leaves_activations(family_of, tmp_path: Path) -> None:
    model = load_model(str(family_of("mixtral")), cache=tmp_path)
    symmetric = {"weights": {"num_bits": 8, "strategy": "channel"}, "input_activations": {
        "num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": False}}  # fmt: skip
    with pytest.raises(PassError, match="is an expert, and every candidate quantizes activations"):
        AutoBits(budget={"bits": 9}, candidates=["W8A8", {"scheme": symmetric}], method=METHOD).requires(model)
