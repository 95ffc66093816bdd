import pytest

from llmopt.benchmarks.ablation import VARIANTS, chosen, row_of, table
from llmopt.benchmarks.child import Finished
from llmopt.benchmarks.quantizers.compare import Result
from llmopt.benchmarks.quantizers.judge import Figures
from llmopt.benchmarks.quantizers.run_passes import recipe_of
from llmopt.optimizer.errors import InputError
from llmopt.passes.gptq import Gptq


def test_each_variant_changes_one_thing_and_no_two_are_the_same() -> None:
    defaults = recipe_of("model", row_of(VARIANTS[1]).passes, threads=1).passes[0].instance.model_dump()
    seen = []
    for variant in VARIANTS[1:]:
        options = recipe_of("model", row_of(variant).passes, threads=1).passes[0].instance
        assert isinstance(options, Gptq)
        changed = {name for name, value in options.model_dump().items() if value != defaults[name]}
        others = (variant.text != VARIANTS[1].text) + (variant.share != 1)
        assert len(changed) + others == (variant.option != "defaults"), variant
        assert changed <= {variant.option}
        seen.append((options, variant.text, variant.share))
    assert len(set(map(str, seen))) == len(seen)
    assert len({row_of(variant).name for variant in VARIANTS}) == len(VARIANTS)


def test_options_are_compared_with_rounding_and_with_the_defaults() -> None:
    assert [v.option for v in chosen(["damping"])] == ["rounding to nearest", "defaults", "damping", "damping"]
    assert chosen([]) == list(VARIANTS)
    with pytest.raises(InputError, match="'clip'"):
        chosen(["clip"])


def test_the_table_says_how_much_of_roundings_loss_is_removed() -> None:
    results = [
        Result(row_of(variant), "llmopt", Finished("", 1, 1), Figures(perplexity, 20.0, 0.1, 0.9))
        for variant, perplexity in zip(VARIANTS[:2], (30.0, 25.0), strict=True)
    ]
    _, _, rounding, gptq = table(results).splitlines()
    assert "+50.00%" in rounding
    assert "| 50% |" in gptq
    failed = Result(row_of(VARIANTS[2]), "llmopt", error="out of memory")
    assert "failed: out of memory" in table([*results, failed])
