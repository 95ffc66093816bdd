"""The recipe of a trial as a file of its own, which ``llmopt build`` takes."""

import io
import os
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from llmopt.evaluation.tuning import Search, Trial
from llmopt.optimizer.recipe import Recipe

__all__ = ["write_recipe"]


def write_recipe(search: Search, trial: Trial, file: Path) -> None:
    """Write the recipe with the values of ``trial``, without ``tune`` and with its constraint among the gates.

    Its paths are relative to ``file``, those that were absolute stay so. References to the environment are filled in.
    """
    recipe = Recipe.written(search.recipe, search.sets(trial.values))
    recipe.pop("tune", None)
    constraint = search.tuning.constraint
    if constraint is not None and constraint not in Recipe.load(search.recipe, search.sets(trial.values)).accept:
        recipe["accept"] = [*(recipe.get("accept") or []), constraint.describe()]
    _move(recipe, search.recipe.parent, file.parent)
    text = io.StringIO()
    YAML(pure=True).dump(_escaped(recipe), text)
    origin = f"# {search.recipe.name} with the values of trial {trial.number} of llmopt tune\n"
    file.write_text(origin + text.getvalue(), encoding="utf-8")


def _move(recipe: dict[str, Any], base: Path, to: Path) -> None:
    """Have the paths in a recipe of ``base`` lead to the same files from ``to``."""

    def moved(text: str) -> str:
        path = Path(text).expanduser()
        # What is no file here is a package, a model or a data set of the hub.
        if path.is_absolute() or not (base / path).exists():
            return text
        return os.path.relpath((base / path).resolve(), to.resolve())

    recipe["model"] = moved(recipe["model"])
    if (recipe.get("calibration") or {}).get("source"):
        recipe["calibration"]["source"] = moved(recipe["calibration"]["source"])
    for gate in recipe.get("accept") or []:
        if gate.get("data"):
            gate["data"] = moved(gate["data"])


def _escaped(value: Any) -> Any:
    """``value`` with every ``${`` written so that it is read as such."""
    if isinstance(value, dict):
        return {key: _escaped(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_escaped(each) for each in value]
    return value.replace("${", "$${") if isinstance(value, str) else value
