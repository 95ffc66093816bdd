"""Build a recipe into a directory with an engine, its measured loss and a verdict."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from llmopt.optimizer.manifest import Manifest

__all__ = ["command"]

_REJECTED = 4


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The build directory.  [default: out/RECIPE]")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change an option of the recipe, as in "
              "passes.0.round_to_nearest.group_size=64; may be repeated.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an existing build.")
@click.option("--offline", is_flag=True, help="Do not ask model hubs; what is in the cache is used.")
@click.option("--json", "as_json", is_flag=True, help="Print progress and the result as JSON lines.")
@click.option("-q", "--quiet", is_flag=True, help="Print the result only.")
def command(
    recipe: Path,
    output: Path | None,
    overrides: tuple[str, ...],
    force: bool,
    offline: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Build RECIPE into a directory with an engine, its measured loss and a verdict.

    The directory appears when everything has succeeded, and not before. Exit code 4 means that the build missed a
    gate of the recipe: it exists, and says so.
    """
    from llmopt.optimizer.cache import cache_root
    from llmopt.optimizer.progress import choose
    from llmopt.optimizer.recipe import Recipe

    checked = Recipe.load(recipe, overrides)
    from llmopt.optimizer.build import build

    output = output or Path("out") / recipe.stem
    progress = choose(as_json=as_json, quiet=quiet)
    manifest = build(checked, output, cache=cache_root(), progress=progress, force=force, offline=offline)
    if as_json:
        progress.note(_peak_memory(output))
        progress.result({"output": str(output), **manifest.model_dump(mode="json")})
    else:
        _show(manifest, output)
    return _REJECTED if manifest.verdict.status == "rejected" else 0


def _show(manifest: "Manifest", output: Path) -> None:
    """The measurements and what to do next."""
    from llmopt.optimizer.cli._console import open_console
    from llmopt.optimizer.cli._tables import gates_table, measurements_table

    console = open_console()
    if manifest.measurements:
        console.print(measurements_table(manifest.measurements))
    if manifest.verdict.gates:
        console.print(gates_table(manifest.verdict))
    console.print(_peak_memory(output), soft_wrap=True)
    for checkpoint in manifest.checkpoints:
        for note in checkpoint.notes:
            console.print(f"{checkpoint.path}: {note}", soft_wrap=True)
        size = _megabytes(manifest, f"{checkpoint.path}/")
        console.print(f"{output / checkpoint.path}: {size}, {checkpoint.format}, {checkpoint.dtype}", soft_wrap=True)
    if manifest.verdict.proxy is not None:
        console.print(f"measured: {manifest.verdict.proxy}", soft_wrap=True)
    sizes = "".join(f"{manifest.bytes_of(engine) / 1e6:.1f} MB, " for engine in manifest.all_engines)
    console.print(f"{output}: {sizes}{manifest.verdict.status}", soft_wrap=True)
    if any(engine.target == "cpu" for engine in manifest.engines) and manifest.verdict.status != "rejected":
        console.print(f"next: llmopt chat {output}", style="dim", soft_wrap=True)


def _megabytes(manifest: "Manifest", prefix: str) -> str:
    return f"{sum(entry.bytes for name, entry in manifest.files.items() if name.startswith(prefix)) / 1e6:.1f} MB"


def _peak_memory(output: Path) -> str:
    """What the build and each of its steps had in RAM at the most."""
    from llmopt.optimizer.build_record import read_record

    record = read_record(output)
    assert record is not None
    steps = (f"{step} {peak / 1e9:.2f}" for step, peak in record["peak_memory_bytes_by_step"].items())
    return f"peak memory: {record['peak_memory_bytes'] / 1e9:.2f} GB resident ({', '.join(steps)})"
