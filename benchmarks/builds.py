"""Builds that benchmarks measure, made by the command that users type."""

from pathlib import Path

from llmopt.benchmarks.child import Finished, llmopt_command, run

__all__ = ["DEFAULT_MODEL", "RECIPES", "build"]

RECIPES = Path(__file__).parents[1] / "recipes"
"""Of the repository: benchmarks are run from a checkout."""

DEFAULT_MODEL = "smollm2-135m"


def build(recipe: Path, out: Path, *, log: Path | None = None) -> tuple[Path, Finished]:
    """Build ``recipe`` into ``out/bench/NAME``, replacing what is there.

    Raises:
        ChildError: The build failed.
    """
    directory = out / "bench" / recipe.stem
    command = [llmopt_command(), "build", str(recipe), "-o", str(directory), "--force"]
    return directory, run(command, log=log or directory.with_name(f"{recipe.stem}.build.log"))
