"""Search options of a recipe for the best build within a limit on the lost accuracy."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from llmopt.evaluation.tuning import Search, Trial
    from llmopt.optimizer.progress import Progress

__all__ = ["command"]


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The study's directory.  [default: out/RECIPE-tune]"
)
@click.option("--search", "searched", multiple=True, metavar="PATH=VALUES", help="An option and the values to try, as "
              "in passes.0.gptq.damping=0.01,0.1 or passes.0.gptq.damping='{min: 0.01, max: 0.1}'; may be repeated, "
              "and adds to the recipe's tune.search.")  # fmt: skip
@click.option("--trials", type=click.IntRange(min=1), help="Builds to try, those of an earlier run included.  "
              "[default: the recipe's, or 20]")  # fmt: skip
@click.option("--objective", type=click.Choice(["size", "speed", "kl"]), help="What is made best.  "
              "[default: the recipe's, or size]")  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change an option of the recipe, as in "
              "passes.0.round_to_nearest.group_size=64; may be repeated.")  # fmt: skip
@click.option("--keep", is_flag=True, help="Keep the builds of all trials.")
@click.option("--force", is_flag=True, help="Remove a study that is there and begin anew.")
@click.option("--offline", is_flag=True, help="Do not ask model hubs; what is in the cache is used.")
@click.option("--json", "as_json", is_flag=True, help="Print progress and the result as JSON lines.")
@click.option("-q", "--quiet", is_flag=True, help="Print the result only.")
def command(
    recipe: Path,
    output: Path | None,
    searched: tuple[str, ...],
    trials: int | None,
    objective: str | None,
    overrides: tuple[str, ...],
    keep: bool,
    force: bool,
    offline: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Search options of a recipe for the best build within a limit on the lost accuracy.

    Each trial is a build, measured, and kept below the study's directory unless another is better in everything.
    best.yaml there is the recipe of the best one; report.html plots size, speed and loss. A study that was stopped,
    or is given more trials, goes on where it was. Exit code 4 means that no trial met the constraint and the gates
    of the recipe.
    """
    from llmopt.optimizer.cache import cache_root
    from llmopt.optimizer.progress import choose
    from llmopt.optimizer.recipe import Recipe
    from llmopt.optimizer.tuning import tuning_of

    tuning = tuning_of(Recipe.load(recipe, overrides).tune, search=searched, trials=trials, objective=objective)

    from llmopt.evaluation.tuning import Search, check_search, tune

    output = output or Path("out") / f"{recipe.stem}-tune"
    search = Search(recipe, overrides, tuning, output, cache_root(), keep=keep, force=force, offline=offline)
    check_search(search)
    progress = choose(as_json=as_json, quiet=quiet)
    _report(search, tune(search, progress), progress, as_json=as_json)


def _report(search: "Search", trials: "Sequence[Trial]", progress: "Progress", *, as_json: bool) -> None:
    """Write best.yaml and the report, print what was found, and refuse a search in which nothing was accepted."""
    from dataclasses import asdict

    from llmopt.evaluation.best_recipe import write_recipe
    from llmopt.evaluation.tuning import best_of
    from llmopt.evaluation.tuning_report import tuning_page
    from llmopt.optimizer.cli._console import open_console
    from llmopt.optimizer.cli._tables import trials_table

    best, file = best_of(trials, search.tuning), search.output / "best.yaml"
    if best is None:
        file.unlink(missing_ok=True)
    else:
        write_recipe(search, best, file)
    page = search.output / "report.html"
    page.write_text(tuning_page(search, trials), encoding="utf-8")
    number = None if best is None else best.number
    if as_json:
        found = {"output": str(search.output), "best": number, "trials": [asdict(trial) for trial in trials]}
        progress.result(found)
    else:
        console = open_console()
        console.print(trials_table(trials, search.tuning))
        console.print(f"report: {page}", soft_wrap=True)
        if best is not None:
            console.print(f"best: trial {number}, {file}", soft_wrap=True)
            console.print(f"next: llmopt build {file}", style="dim", soft_wrap=True)
    if best is None:
        _refuse(search, trials)


def _refuse(search: "Search", trials: "Sequence[Trial]") -> None:
    """Raise what is to be said when no trial was accepted."""
    from llmopt.evaluation.tuning import nearest_of
    from llmopt.optimizer.errors import PassError, RejectedError

    nearest = nearest_of(trials)
    if nearest is None:
        raise PassError(f"none of {len(trials)} trials could be built; trial {trials[0].number}: {trials[0].message}")
    raise RejectedError(
        f"none of {len(trials)} trials met every limit; trial {nearest.number} came nearest: {nearest.message}",
        hint=f"its build is {search.output / 'trials' / str(nearest.number)}; allow more loss or search other options",
    )
