"""Merged adapters: PEFT's own merge, and the formulas of its documentation written out."""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmopt.calibration.reference import Reference
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import PassError, UnsupportedError
from llmopt.optimizer.lora.adapter import read_adapter
from llmopt.optimizer.lora.factors import factors_of
from llmopt.optimizer.model import DenseWeight, QuantWeight
from llmopt.optimizer.rounding import quantize
from llmopt.optimizer.scheme import PRESETS
from llmopt.optimizer.sources import load_model
from llmopt.passes.awq import Awq
from llmopt.passes.dequantize import Dequantize
from llmopt.passes.merge_lora import MergeLora
from llmopt.passes.rescale import Rescale
from llmopt.passes.rotate import Rotate
from llmopt.passes.round_to_nearest import RoundToNearest
from llmopt.passes.smoothquant import Smoothquant

IDS = torch.randint(3, 500, (2, 16), generator=torch.Generator().manual_seed(7))
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]

CASES = {
    "lora": ("llama", {"target_modules": LINEARS}),
    "rslora": ("qwen3", {"target_modules": LINEARS, "use_rslora": True, "r": 8}),
    "dora": ("llama", {"target_modules": LINEARS, "use_dora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": LINEARS,
            "rank_pattern": {"layers.0.self_attn.q_proj": 6, "^model.layers.[12].mlp.*": 2, "o_proj": 3},
            "alpha_pattern": {"v_proj": 3, r"layers\.1\..*": 16},
        },
    ),
    "expression": ("llama", {"target_modules": r".*\.[02]\.self_attn\.[qv]_proj"}),
    "some layers": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "exclude_modules": ["up_proj"]},
    ),
    "all linears": ("qwen3", {"target_modules": "all-linear"}),
    "bias all": ("llama-odd", {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "bias of adapted": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "bias of factors": ("llama-odd", {"target_modules": LINEARS, "lora_bias": True, "use_rslora": True}),
    "both biases": ("llama-odd", {"target_modules": ["q_proj", "up_proj"], "lora_bias": True, "bias": "all"}),
    "saved experts": ("mixtral", {"target_modules": ["q_proj"], "modules_to_save": ["experts", "mlp.gate"]}),
    "saved modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "down_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "embedding dora": ("qwen3", {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "use_dora": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "bias": "all"}),
    "conv1d dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "conv1d saved": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["c_fc", "wpe"]}),
    "packed": ("falcon-40b", {"target_modules": ["query_key_value", "dense_4h_to_h"]}),
    "experts": ("qwen3_moe", {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]}),
    "experts by parameter": (
        "mixtral",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"],
            "rank_pattern": {"experts.down_proj": 3, "gate.weight": 2},
            "alpha_pattern": {"experts.gate_up_proj": 5},
        },
    ),
    "one parameter of the experts": ("mixtral", {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}),
}  # fmt: skip


def merged(model, folder, *, context=None, **options):
    one = MergeLora(**({"adapters": [{"path": str(folder)}]} | options))
    one.requires(model)
    return one.run(model, context or PassContext())


def logits(model):
    return Reference(model).logits(IDS)


def with_peft(adapted):
    """Logits of PEFT's model with its adapter beside the weights."""
    with torch.no_grad():
        return adapted(IDS).logits


def assert_same_logits(found, expected):
    """Float32 sums in another order: a few 1e-6 of the largest logit."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_is_pefts_own(case, family_of, model_of, adapter_of, tmp_path) -> None:
    family, settings = CASES[case]
    adapted = adapter_of(tmp_path / "a", family_of(family), **settings)
    base = model_of(family)
    model = merged(base, tmp_path / "a")
    expected = with_peft(adapted)
    assert (logits(base) - expected).abs().max() > 1e-2 * expected.abs().max(), "the adapter does something"
    assert_same_logits(logits(model), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = adapted.merge_and_unload(safe_merge=True)
        whole.save_pretrained(tmp_path / "whole")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "whole" / name).write_bytes((family_of(family) / name).read_bytes())
    theirs = load_model(str(tmp_path / "whole"), cache=tmp_path)
    assert model.weights.keys() == theirs.weights.keys()
    for name, weight in theirs.weights.items():
        # One rounding to float32 of a product and of a sum each.
        torch.testing.assert_close(model.weights[name].dense(), weight.dense(), rtol=1e-5, atol=2e-6, msg=name)
    assert any(weight is not base.weights[name] for name, weight in model.weights.items())


def test_it_is_the_formula_that_papers_give(model_of, family_of, adapter_of, tmp_path) -> None:
    adapter_of(tmp_path / "lora", family_of("llama"), target_modules=["q_proj"], r=4, lora_alpha=6)
    adapter_of(tmp_path / "rslora", family_of("llama"), target_modules=["q_proj"], r=4, lora_alpha=6, use_rslora=True)
    adapter_of(tmp_path / "dora", family_of("llama"), target_modules=["q_proj"], r=4, lora_alpha=6, use_dora=True)
    base, name = model_of("llama"), "model.layers.1.self_attn.q_proj"
    weight = base.weights[f"{name}.weight"].dense().double()
    for kind, scaling in {"lora": 6 / 4, "rslora": 6 / 2, "dora": 6 / 4}.items():
        stored = load_file(tmp_path / kind / "adapter_model.safetensors")
        down, up = (stored[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        expected = weight + scaling * up @ down
        if kind == "dora":
            lengths = stored[f"base_model.model.{name}.lora_magnitude_vector"].double()
            expected = lengths[:, None] * expected / expected.square().sum(1, keepdim=True).sqrt()
        found = merged(base, tmp_path / kind).weights[f"{name}.weight"]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.dense(), expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "own_head"),
    [
        ({"target_modules": ["embed_tokens", "q_proj"]}, True),
        ({"target_modules": ["lm_head", "q_proj"]}, True),
        ({"target_modules": ["embed_tokens", "lm_head"]}, True),
        ({"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
    ],
    ids=str,
)
def test_a_shared_table_is_split_where_an_adapter_changes_one_use_of_it(
    settings, own_head, model_of, family_of, adapter_of, tmp_path
) -> None:
    adapted = adapter_of(tmp_path / "a", family_of("qwen2"), **settings)
    base, notes = model_of("qwen2"), []
    assert base.is_tied
    model = merged(base, tmp_path / "a", context=PassContext(note=notes.append))
    assert model.is_tied is not own_head
    assert any("table of its own" in note for note in notes) is own_head
    assert_same_logits(logits(model), with_peft(adapted))


def test_factors_of_single_experts_as_transformers_4_had_them(model_of, family_of, adapter_of, tmp_path) -> None:
    """The same adapter in both forms: one pair for all experts, and a pair for each of their linears."""
    targets = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    adapter_of(tmp_path / "a", family_of("mixtral"), **targets)
    stored = load_file(tmp_path / "a/adapter_model.safetensors")
    split = {}
    for layer in range(3):
        place, name = f"base_model.model.model.layers.{layer}.mlp.experts", "block_sparse_moe.experts"
        for below, spans in ((".base_layer", {"w1": slice(0, 96), "w3": slice(96, 192)}), ("", {"w2": slice(0, 64)})):
            down, up = (stored[f"{place}{below}.lora_{part}.weight"] for part in "AB")
            for expert in range(4):
                for linear, span in spans.items():
                    key = f"base_model.model.model.layers.{layer}.{name}.{expert}.{linear}"
                    split[f"{key}.lora_A.weight"] = down[4 * expert : 4 * expert + 4].clone()
                    split[f"{key}.lora_B.weight"] = up[span, expert::4].clone()
    (tmp_path / "b").mkdir()
    save_file(split, tmp_path / "b/adapter_model.safetensors")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    config |= {"target_modules": ["w1", "w2", "w3"], "target_parameters": None}
    (tmp_path / "b/adapter_config.json").write_text(json.dumps(config))
    base = model_of("mixtral")
    stacked, single = (merged(base, tmp_path / name) for name in "ab")
    changed = [name for name, weight in stacked.weights.items() if weight is not base.weights[name]]
    assert len(changed) == 3 * 4 * 3
    assert all(torch.equal(stacked.weights[name].dense(), single.weights[name].dense()) for name in changed)


@pytest.fixture
def two(family_of, adapter_of, tmp_path):
    """Two adapters of different rank, one of them on fewer linears, and how a recipe names them."""
    for name, settings in {"a": {"r": 4}, "b": {"r": 2, "lora_alpha": 3}}.items():
        targets = ["q_proj", "k_proj", "down_proj"][: 3 if name == "a" else 2]
        adapter_of(tmp_path / name, family_of("llama"), seed=ord(name), target_modules=targets, **settings)
    return [{"path": str(tmp_path / "a"), "weight": 0.7}, {"path": str(tmp_path / "b"), "weight": -1.2}]


PEFTS_NAMES = {"linear": "svd", "magnitude_prune": "magnitude_prune_svd", "ties": "ties_svd"}


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("combine", PEFTS_NAMES)
def test_several_adapters_are_combined_as_peft_does_it(combine, sign, two, model_of, family_of) -> None:
    network = AutoModelForCausalLM.from_pretrained(family_of("llama"))
    density = {} if combine == "linear" else {"density": 0.3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(network, two[0]["path"], adapter_name="a")
        adapted.load_adapter(two[1]["path"], adapter_name="b")
        # At full rank nothing is cut off; rows and columns without a counterpart have singular values of 0.
        how = {"combination_type": PEFTS_NAMES[combine], "svd_rank": 64, "svd_full_matrices": False}
        adapted.add_weighted_adapter(["a", "b"], [0.7, -1.2], "both", majority_sign_method=sign, **how, **density)
        theirs = adapted.merge_and_unload(adapter_names=["both"]).state_dict()
    model = merged(model_of("llama"), None, adapters=two, combine=combine, majority_sign_method=sign, **density)
    for name, weight in model.weights.items():
        # A singular value decomposition in float32, against none.
        torch.testing.assert_close(weight.dense(), theirs[name], rtol=0, atol=2e-5, msg=name)


def test_a_sum_of_adapters_is_the_exact_one(two, model_of) -> None:
    base = model_of("llama")
    both = merged(base, None, adapters=two)
    alone = [merged(base, None, adapters=[each]) for each in two]
    for name, weight in base.weights.items():
        changes = [each.weights[name].dense() - weight.dense() for each in alone]
        torch.testing.assert_close(both.weights[name].dense(), weight.dense() + sum(changes), rtol=0, atol=1e-6)


@pytest.mark.parametrize("combine", ["dare_linear", "dare_ties"])
def test_what_is_dropped_at_random_follows_from_the_seed(combine, two, model_of) -> None:
    options = {"adapters": two, "combine": combine, "density": 0.5}
    first, again, other = (merged(model_of("llama"), None, context=PassContext(seed=n), **options) for n in (1, 1, 2))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(first.weights[name].dense(), again.weights[name].dense())
    assert not torch.equal(first.weights[name].dense(), other.weights[name].dense())


def test_what_an_adapter_is_and_where_it_comes_from_is_recorded(two, model_of) -> None:
    notes, details = [], {}
    merged(model_of("llama"), None, adapters=two, context=PassContext(note=notes.append, detail=details.__setitem__))
    assert notes == [
        f"{two[0]['path']}: LoRA of rank 4, changes 9 weights",
        f"{two[1]['path']}: LoRA of rank 2, changes 6 weights",
        "the build is measured against the source model with this in it",
    ]
    assert [len(digest) for digest in details["files"]] == [64] * 4


def test_a_base_of_another_name_is_noted_where_the_shapes_fit(two, model_of, tmp_path) -> None:
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "org/Other@12ab"}))
    notes = []
    merged(model_of("llama"), tmp_path / "a", context=PassContext(note=notes.append))
    spec = model_of("llama").source.spec
    assert f"{tmp_path / 'a'} says that it was trained on org/Other@12ab; its shapes fit {spec}" in notes


BEHIND = {
    "rotate": (Rotate(),),
    "rotate online": (Rotate(online={"down_proj": 32}),),
    "smoothquant": (Smoothquant(pairs=("norm", "value", "up")),),
    "awq": (Awq(scheme="W4A16", group_size=16, rounds=False),),
    "rescale": (Rescale(),),
    "all of them": (Rescale(), Smoothquant(), Rotate(online={"down_proj": 32})),
}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi3"])
@pytest.mark.parametrize("case", BEHIND)
def test_an_adapter_follows_its_base_through_other_passes(
    case, family, model_of, context, family_of, adapter_of, tmp_path
):
    """Merged behind them it computes what PEFT's model does."""
    targets = {"gpt2": ["c_attn", "c_proj", "c_fc", "lm_head"], "phi3": ["qkv_proj", "o_proj", "gate_up_proj"]}
    adapted = adapter_of(tmp_path / "a", family_of(family), target_modules=targets.get(family, [*LINEARS, "lm_head"]))
    model = model_of(family)
    for one in BEHIND[case]:
        model = one.run(model, context[0])
    found, expected = logits(merged(model, tmp_path / "a")), with_peft(adapted)
    assert (logits(model) - expected).abs().max() > 1e-2 * expected.abs().max()
    # Weights have been rounded to float32 by each pass.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "one", [Rotate(), Rotate(online={"down_proj": 32}), Rescale()], ids=["rotate", "online", "rescale"]
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_turned_base_with_the_turned_adapter_is_the_turned_merge(
    one, family, model_of, family_of, adapter_of, tmp_path
):
    adapter_of(tmp_path / "a", family_of(family), target_modules=LINEARS)
    base = model_of(family)
    turned = one.run(base, PassContext(seed=3))
    expected = one.run(merged(base, tmp_path / "a"), PassContext(seed=3))
    factors = factors_of(read_adapter(tmp_path / "a", base), turned)
    assert factors.keys() == {name for name in base.linears() if name != "lm_head"}
    for module, each in factors.items():
        found = turned.weights[f"{module}.weight"].dense() + each.up @ each.down
        torch.testing.assert_close(found, expected.weights[f"{module}.weight"].dense(), rtol=1e-5, atol=2e-6)


def test_what_is_no_product_of_factors_does_not_follow(model_of, family_of, adapter_of, two, tmp_path) -> None:
    adapter_of(tmp_path / "dora", family_of("llama"), target_modules=["q_proj"], use_dora=True)
    turned = Rotate().run(model_of("llama"), PassContext())
    with pytest.raises(PassError, match=r"all that .*dora changes needs the weights that the adapters were trained on"):
        merged(turned, tmp_path / "dora")
    with pytest.raises(PassError, match="combine: ties needs the weights"):
        merged(turned, None, adapters=two, combine="ties", density=0.5)
    with pytest.raises(UnsupportedError, match="has DoRA, which are no product of two factors"):
        factors_of(read_adapter(tmp_path / "dora", turned), turned)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16", "W4A16_ASYM", "W8A16", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_a_quantized_base_stays_in_its_scheme(scheme, model_of, family_of, adapter_of, tmp_path) -> None:
    adapter_of(tmp_path / "a", family_of("llama"), target_modules=["q_proj", "down_proj", "lm_head"])
    size = {"group_size": 16} if scheme.startswith("W4") else {}
    base = RoundToNearest(scheme=scheme, **size).run(model_of("llama"), PassContext())
    notes, details = [], {}
    model = merged(base, tmp_path / "a", context=PassContext(note=notes.append, detail=details.__setitem__))
    exact = merged(Dequantize().run(base, PassContext()), tmp_path / "a")
    assert details["errors"].keys() == details["adapter_kept"].keys()
    for name, weight in model.weights.items():
        assert getattr(weight, "scheme", None) == getattr(base.weights[name], "scheme", None)
        module = name.removesuffix(".weight")
        if module not in details["errors"]:
            continue
        expected, found, before = (each.weights[name].dense() for each in (exact, model, base))
        error = (found - expected).norm() / expected.norm()
        assert details["errors"][module] == pytest.approx(float(error), rel=1e-4)
        plain = quantize(expected, weight.scheme).dense()
        assert error <= (plain - expected).norm() / expected.norm() + 1e-6, "ranges are searched"
        kept = ((found - before) * (expected - before)).sum() / (expected - before).square().sum()
        assert details["adapter_kept"][module] == pytest.approx(float(kept), abs=1e-4)
        assert kept > 0.9
    assert [note for note in notes if "rounded again by round_to_nearest" in note]


def test_a_shared_table_that_was_quantized_is_rounded_once_for_each_use(
    model_of, family_of, adapter_of, tmp_path
) -> None:
    adapter_of(tmp_path / "a", family_of("qwen2"), target_modules=["lm_head"])
    base = RoundToNearest(scheme="W8A16").run(model_of("qwen2"), PassContext())
    model = merged(base, tmp_path / "a")
    assert not model.is_tied
    assert model.weights["model.embed_tokens.weight"] is base.weights["model.embed_tokens.weight"]
    assert isinstance(model.weights["lm_head.weight"], QuantWeight)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrated_rounding_of_a_merge_loses_less(
    method, model_of, family_of, adapter_of, context, distance, tmp_path
):
    adapter_of(tmp_path / "a", family_of("llama"), target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"])
    options = {"scheme": "W4A16", "group_size": 16, "head": "W8A16"}
    base = RoundToNearest(**options).run(model_of("llama"), PassContext())
    handed, details = context
    exact = merged(Dequantize().run(base, PassContext()), tmp_path / "a")
    plain = merged(base, tmp_path / "a")
    model = merged(base, tmp_path / "a", context=handed, requantize=method)
    assert {name for name, weight in model.weights.items() if weight is not base.weights[name]} == {
        name for name, weight in plain.weights.items() if weight is not base.weights[name]
    }
    assert all(getattr(w, "scheme", None) == getattr(base.weights[n], "scheme", None) for n, w in model.weights.items())
    assert details["output_errors"].keys() == details["errors"].keys() == details["adapter_kept"].keys()
    assert distance(exact, model) < distance(exact, plain)


def test_asking_to_requantize_what_is_in_float_is_an_error(model_of, two) -> None:
    with pytest.raises(PassError, match="requantize is gptq, and nothing that the adapters change is quantized"):
        MergeLora(adapters=two, requantize="gptq").requires(model_of("llama"))


def test_the_columns_of_a_group_that_lie_apart_stay_in_it(model_of, family_of, adapter_of, tmp_path) -> None:
    """As in GPTQ checkpoints that were quantized in the order of activations."""
    adapter_of(tmp_path / "a", family_of("llama"), target_modules=["q_proj"])
    base, name = model_of("llama"), "model.layers.0.self_attn.q_proj.weight"
    weight = base.weights[name].dense()
    index = torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 16
    scheme = PRESETS["W4A16"].with_group_size(16)
    order = index.argsort(stable=True)
    sorted_ = quantize(weight[:, order], scheme)
    values = torch.empty_like(sorted_.values)
    values[:, order] = sorted_.values
    apart = QuantWeight.of(sorted_._replace(values=values, group_index=index.to(torch.int32)), scheme)
    model = merged(base.with_weights({name: apart}), tmp_path / "a")
    exact = merged(base.with_weights({name: DenseWeight.of(apart.dense())}), tmp_path / "a")
    found, expected = model.weights[name].dense(), exact.weights[name].dense()
    assert torch.equal(model.weights[name].load().group_index, index.to(torch.int32))
    assert (found - expected).norm() < 0.12 * expected.norm()  # of 4 bits


def test_weights_that_overflow_are_an_error(two, model_of) -> None:
    far = [{**two[0], "weight": 1e39}]
    with pytest.raises(PassError, match="not finite with the adapters in it"):
        merged(model_of("llama"), None, adapters=far).weights["model.layers.0.self_attn.q_proj.weight"].load()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"combine": "ties"}, "combine: ties needs a density"),
        ({"density": 0.5}, "density is of no use to combine: linear"),
        ({"combine": "dare_ties", "density": 0}, "greater than 0"),
        ({"adapters": []}, "at least 1 item"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, said, two) -> None:
    with pytest.raises(ValidationError, match=said):
        MergeLora(**({"adapters": two} | options))
