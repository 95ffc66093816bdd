"""Write a model in another checkpoint format, with the integers that it has."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from llmopt.exporters.checkpoint.exporter import Checkpoint
    from llmopt.exporters.gguf.exporter import Gguf
    from llmopt.optimizer.model import Model

__all__ = ["command"]

_FORMATS = ("compressed-tensors", "gptq", "gptq_v2", "awq", "fp8", "safetensors", "gguf")

_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


@click.command("convert")
@click.argument("source")
@click.option("--to", "form", type=click.Choice(_FORMATS), required=True, help="The format; safetensors means floats.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The new directory.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of floats, and of scales where "
              "the format leaves it open. [default: the model's own]")  # fmt: skip
@click.option("--type", "kind", type=click.Choice(_TYPES), help="Of floats in gguf. [default: Q8_0]")
@click.option("--force", is_flag=True, help="Replace a checkpoint that is there.")
@click.option("--offline", is_flag=True, help="Do not ask model hubs; what is in the cache is used.")
@click.option("-q", "--quiet", is_flag=True, help="Print the result only.")
def command(
    source: str,
    form: str,
    output: Path,
    dtype: str | None,
    kind: str | None,
    force: bool,
    offline: bool,
    quiet: bool,
) -> None:
    """Write SOURCE, a model as in a recipe, in another checkpoint format.

    Nothing is quantized again: integers, zero points and FP8 numbers stay as they are, and a format that has no place
    for them is refused. `llmopt build` quantizes; but gguf rounds what is in float to its type.
    """
    from llmopt.optimizer.cache import cache_root, digest_of, locked, publish
    from llmopt.optimizer.contracts import PassContext
    from llmopt.optimizer.model_check import check_as_it_is
    from llmopt.optimizer.progress import choose
    from llmopt.optimizer.sources import load_model

    _refuse_existing(output, force=force)
    progress = choose(as_json=False, quiet=quiet)
    exporter = _exporter(form, dtype, kind)
    with progress.step("load_model"):
        model = load_model(source, cache=cache_root(), offline=offline)
        exporter.check(model)
        check_as_it_is(model, exporter)
        if form not in ("safetensors", "gguf"):
            _check_quantized(model)
    lock = locked(cache_root() / "locks" / digest_of(str(output.resolve())))
    with lock, publish(output.resolve()) as directory, progress.step(f"write {form}") as tick:
        written = exporter.write(model, directory, PassContext(progress=tick))
    for note in (*model.source.notes, *written.notes):
        click.echo(f"note: {note}")
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    click.echo(f"{output}: {form}, {size / 1e6:.1f} MB")


def _exporter(form: str, dtype: str | None, kind: str | None) -> "Checkpoint | Gguf":
    from llmopt.exporters.checkpoint.exporter import Checkpoint
    from llmopt.exporters.gguf.exporter import Gguf

    if form == "gguf":
        if dtype is not None:
            raise click.UsageError("--dtype is for checkpoints; --type says what floats become in gguf")
        return Gguf.model_validate({} if kind is None else {"type": kind})
    if kind is not None:
        raise click.UsageError("--type is for gguf; --dtype says what floats become in checkpoints")
    return Checkpoint.model_validate({"format": form, "dtype": dtype})


def _refuse_existing(output: Path, *, force: bool) -> None:
    from llmopt.optimizer.errors import InputError

    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() and not any((output / name).is_file() for name in ("config.json", "Modelfile")):
        raise InputError(f"{output} exists and is no checkpoint", hint="name another directory with -o")
    if output.exists() and not force:
        raise InputError(f"{output} exists", hint="--force replaces it, or name another directory with -o")


def _check_quantized(model: "Model") -> None:
    from llmopt.exporters.checkpoint.layout import packed_linears
    from llmopt.optimizer.errors import InputError

    if not packed_linears(model):
        raise InputError(
            f"no linear of {model.source.spec} is quantized, and convert does not quantize",
            hint="llmopt build does, with a recipe that has a quantizing pass and a checkpoint under export",
        )
