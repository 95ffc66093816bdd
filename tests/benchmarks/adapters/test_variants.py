"""The recipes that the demo writes are ones that llmopt takes."""

from pathlib import Path

import pytest

from llmopt.benchmarks.adapters.variants import BASE, HELD_OUT, TRAINED_ON, VARIANTS, write_recipe
from llmopt.optimizer.recipe import Recipe


@pytest.mark.parametrize("variant", [BASE, *VARIANTS], ids=lambda variant: variant.name)
def test_its_recipe_loads(variant, adapter_of, tiny_llama: Path, tmp_path: Path) -> None:
    adapter_of(tmp_path / "adapter", tiny_llama, target_modules=["q_proj"])
    for name in (TRAINED_ON, HELD_OUT):
        (tmp_path / name).write_text("{}\n")
    recipe = Recipe.load(write_recipe(variant, tmp_path, model=str(tiny_llama)))
    names = [step.name for step in recipe.passes]
    assert (names[:1] == ["merge_lora"]) == (variant is not BASE and not variant.modular)
    assert variant is not BASE or names == []
    (export,) = recipe.export
    assert (export.instance.lora is not None) == variant.modular
