"""Add LoRA adapters to a build that takes them, list them, or remove one."""

from pathlib import Path

import click

__all__ = ["command"]


@click.group()
def command() -> None:
    """Add LoRA adapters to a build whose recipe has the option lora, list them, or remove one."""


@command.command("add")
@click.argument("build", type=click.Path(path_type=Path))
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--name", help="What requests call it; the folder's name when omitted.")
@click.option("--force", is_flag=True, help="Replace the adapter of that name.")
def add(build: Path, adapter: Path, name: str | None, force: bool) -> None:
    """Convert ADAPTER, a folder that PEFT saved, for the engine of BUILD and keep it there.

    It is checked against the base, and changed as the passes changed that. A server that runs takes it in with POST
    /v1/load_lora_adapter; others find it when they start.
    """
    from llmopt.optimizer.lora.adapter_file import check_name, publish_adapter
    from llmopt.optimizer.lora.fitting import fit_adapter, slots_of
    from llmopt.optimizer.manifest import Manifest

    chosen = check_name(adapter.resolve().name if name is None else name)
    found = fit_adapter(adapter, build, slots_of(build, Manifest.load(build)))
    if found.other_base is not None:
        click.echo(f"note: {adapter} says that it was trained on {found.other_base}", err=True)
    file = publish_adapter(build, chosen, found.factors, trained_on=found.trained_on, force=force)
    click.echo(f"{file.path}: rank {file.entry.rank} in {file.entry.modules} linears, {file.entry.bytes / 1e6:.1f} MB")


@command.command("list")
@click.argument("build", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the index as JSON.")
def list_adapters(build: Path, as_json: bool) -> None:
    """List the adapters of BUILD."""
    import json

    from llmopt.optimizer.lora.adapter_file import read_index
    from llmopt.optimizer.lora.fitting import slots_of
    from llmopt.optimizer.manifest import Manifest

    slots_of(build, Manifest.load(build))
    adapters = read_index(build)
    if as_json:
        click.echo(json.dumps({name: file.entry.model_dump() for name, file in adapters.items()}, indent=1))
        return
    for name, file in adapters.items():
        entry = file.entry
        base = f", trained on {entry.trained_on}" if entry.trained_on else ""
        click.echo(f"{name}: rank {entry.rank} in {entry.modules} linears, {entry.bytes / 1e6:.1f} MB{base}")
    if not adapters:
        click.echo(f"{build} has no adapters; llmopt adapter add {build} FOLDER adds one")


@command.command("remove")
@click.argument("build", type=click.Path(path_type=Path))
@click.argument("name")
def remove(build: Path, name: str) -> None:
    """Remove the adapter NAME from BUILD; a server that runs keeps what it has loaded until it is told otherwise."""
    from llmopt.optimizer.lora.adapter_file import remove_adapter
    from llmopt.optimizer.lora.fitting import slots_of
    from llmopt.optimizer.manifest import Manifest

    slots_of(build, Manifest.load(build))
    remove_adapter(build, name)
    click.echo(f"removed {name}")
