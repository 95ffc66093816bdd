"""Run a recipe's passes one by one and measure the accuracy after each."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from llmopt.evaluation.bisect import Stage
    from llmopt.optimizer.model import Model
    from llmopt.optimizer.recipe import Recipe

__all__ = ["command"]


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change an option of the recipe, as in "
              "passes.0.round_to_nearest.group_size=64; may be repeated.")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path), help="A text file, instead of text sampled from the model.")
@click.option("--windows", type=click.IntRange(min=1), help="Windows of the text.  [default: 8; sampled text: 16]")
@click.option("--tokens", type=click.IntRange(min=2), help="Tokens per window.  [default: 1024; sampled text: 128]")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result as JSON to this file.")
@click.option("--html", type=click.Path(path_type=Path), help="Write the result as one HTML page to this file.")
@click.option("--offline", is_flag=True, help="Do not ask model hubs; what is in the cache is used.")
@click.option("-q", "--quiet", is_flag=True, help="Print the result only.")
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    data: Path | None,
    windows: int | None,
    tokens: int | None,
    json_file: Path | None,
    html: Path | None,
    offline: bool,
    quiet: bool,
) -> None:
    """Run a recipe's passes one by one and measure the accuracy after each.

    The source model, the model after each weight pass, the standard graph and the graph after each graph pass predict
    the same tokens; the table shows how far each is from the source model, and the last line names the pass that
    costs most. Passes that changed nothing are not measured again. No build is made.
    """
    import json

    from llmopt.optimizer.cache import cache_root
    from llmopt.optimizer.cli._files import check_writable
    from llmopt.optimizer.progress import choose
    from llmopt.optimizer.recipe import Recipe

    for file in (json_file, html):
        if file is not None:
            check_writable(file)
    checked = Recipe.load(recipe, overrides)

    from llmopt.evaluation.bisect import Text, bisect
    from llmopt.evaluation.bisect_report import bisection_facts, bisection_page

    text = Text(data, windows, tokens)
    progress = choose(quiet=quiet)
    stages = _stages_of(checked)
    found = bisect(checked, text, stages, cache=cache_root(), progress=progress, offline=offline)
    if json_file is not None:
        json_file.write_text(json.dumps(bisection_facts(found), indent=1) + "\n", encoding="utf-8")
    if html is not None:
        html.write_text(bisection_page(found), encoding="utf-8")

    from llmopt.optimizer.cli._console import open_console
    from llmopt.optimizer.cli._tables import bisection_table

    console = open_console()
    console.print(bisection_table(found))
    console.print(found.conclusion, soft_wrap=True)


def _stages_of(recipe: "Recipe") -> "Callable[[Model], Iterator[Stage]]":
    """The graphs of every ONNX engine that the recipe exports."""

    def stages_of(model: "Model") -> "Iterator[Stage]":
        from llmopt.exporters.onnx.exporter import Onnx
        from llmopt.exporters.onnx.lowering import stages

        for item in recipe.export:
            if isinstance(item.instance, Onnx):
                [target] = item.instance.executors()
                yield from stages(model, target, capacity=item.instance.longest(model), strict=recipe.strict)

    return stages_of
