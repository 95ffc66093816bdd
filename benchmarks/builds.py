"""Builds that benchmarks measure, made by the command that users type."""

from collections.abc import Mapping
from pathlib import Path

from llmopt.benchmarks.child import Finished, llmopt_command, run
from llmopt.optimizer.cache import cache_root
from llmopt.optimizer.manifest import Manifest
from llmopt.optimizer.model import Model

__all__ = ["DEFAULT_MODEL", "RECIPES", "build", "source_model"]

RECIPES = Path(__file__).parents[1] / "recipes"
"""Of the repository: benchmarks are run from a checkout."""

DEFAULT_MODEL = "smollm2-135m"


def build(recipe: Path, out: Path, *, environment: Mapping[str, str] | None = None) -> tuple[Path, Finished]:
    """Build ``recipe`` into ``out/bench/NAME``, replacing what is there.

    Args:
        recipe: The file.
        out: See above.
        environment: Variables added to this process's own.

    Raises:
        ChildError: The build failed.
    """
    directory = out / "bench" / recipe.stem
    command = [llmopt_command(), "build", str(recipe), "-o", str(directory), "--force"]
    return directory, run(command, log=directory.with_name(f"{recipe.stem}.build.log"), environment=environment)


def source_model(directory: Path) -> Model:
    """The model that a build of one of ``RECIPES`` was made from."""
    from llmopt.optimizer.sources import load_model

    spec = Manifest.load(directory).source.spec
    return load_model(spec, cache=cache_root(), base=RECIPES)
