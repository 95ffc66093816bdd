"""Measures time and peak memory of ``llmopt build``, with the model downloaded already and nothing else cached."""

import argparse
import shutil
from pathlib import Path

from llmopt.benchmarks.builds import DEFAULT_MODEL, RECIPES, build
from llmopt.benchmarks.report import markdown, publish_result
from llmopt.optimizer.cache import cache_root
from llmopt.optimizer.recipe import Recipe
from llmopt.optimizer.sources import locate

__all__ = ["main"]

_RESULTS = {"passes", "samples"}
"""Folders of the cache with what builds computed."""


def main() -> None:
    """Build every recipe of the default model and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipes", nargs="*", type=Path, help=f"omitted: recipes/{DEFAULT_MODEL}-*.yaml")
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    recipes = arguments.recipes or sorted(RECIPES.glob(f"{DEFAULT_MODEL}-*.yaml"))
    rows, data = [], []
    for recipe in recipes:
        locate(Recipe.load(recipe).model, cache=cache_root(), base=recipe.parent)
        cache = _cache_without_results(arguments.out / "bench" / "cache")
        directory, finished = build(recipe, arguments.out, environment={"LLMOPT_CACHE": str(cache)})
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        data.append(
            {"recipe": recipe.name, "seconds": finished.seconds, "peak_bytes": finished.peak_bytes, "build_bytes": size}
        )
        figures = f"{finished.seconds:.0f}", f"{finished.peak_bytes / 1e9:.2f}", f"{size / 1e6:.0f}"
        rows.append([recipe.stem, *figures])
    table = markdown(["recipe", "seconds", "peak memory, GB", "size of the build, MB"], rows)
    publish_result(arguments.out, "build_cost", "What building costs", table, data)


def _cache_without_results(directory: Path) -> Path:
    """A new cache with the downloads of the user's own, linked, and nothing that a build computed."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for entry in cache_root().iterdir():
        if entry.name not in _RESULTS:
            (directory / entry.name).symlink_to(entry.resolve())
    return directory


if __name__ == "__main__":
    main()
