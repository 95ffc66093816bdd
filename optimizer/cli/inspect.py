"""Show what is in a build: layers, schemes, sizes, passes, measurements and the verdict; of a model, its layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

    from llmopt.optimizer.manifest import Layer, LoraSlots, Manifest

__all__ = ["command"]


@click.command()
@click.argument("build")
@click.option("--layers", "every_layer", is_flag=True, help="A row for every layer instead of a summary.")
@click.option("--graph", "graphs", is_flag=True, help="Operators before and after each graph pass, and per layer.")
@click.option("--html", type=click.Path(path_type=Path), help="Write the report as one HTML page to this file.")
@click.option("--verify", is_flag=True, help="Compare the digest of every file with the manifest's.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON; of a model, its layers.")
def command(build: str, every_layer: bool, graphs: bool, html: Path | None, verify: bool, as_json: bool) -> None:
    """Show what is in BUILD: layers, schemes, sizes, passes, measurements and the verdict.

    BUILD may also be a model as in a recipe, quantized or not: a checkpoint's directory, a GGUF file, a model on the
    hub. Then its layers, schemes and sizes are shown.
    """
    from llmopt.optimizer.cli._files import check_writable
    from llmopt.optimizer.manifest import Manifest

    if html is not None:
        check_writable(html)
    if _is_model(build):
        for option, given in {"--graph": graphs, "--html": html is not None, "--verify": verify}.items():
            if given:
                raise click.UsageError(f"{option} is for builds, and {build} is a model")
        _show_model(build, every_layer=every_layer, as_json=as_json)
        return
    manifest = Manifest.load(Path(build), verify=verify)
    if html is not None:
        _write_page(manifest, Path(build), html)
    if as_json:
        click.echo(manifest.model_dump_json(indent=1))
        return
    from llmopt.optimizer.cli._console import open_console

    console = open_console()
    if graphs:
        _print_graphs(manifest, console)
    elif html is None or every_layer:
        _show(manifest, Path(build), console, every_layer=every_layer)
    if html is not None:
        click.echo(f"{html}: the report of {build}")
    if verify:
        click.echo(f"verified: {len(manifest.files)} files are what the manifest says")


def _is_model(spec: str) -> bool:
    """Whether ``spec`` names a model rather than a build: no directory of ours, but what a recipe may name."""
    from llmopt.optimizer.hub import looks_like_id

    path = Path(spec)
    if path.is_dir():
        from llmopt.optimizer.manifest import MANIFEST_NAME

        return (path / "config.json").is_file() and not (path / MANIFEST_NAME).is_file()
    return spec.startswith("pypi:") or path.is_file() or (looks_like_id(spec) and not path.parent.is_dir())


def _show_model(spec: str, *, every_layer: bool, as_json: bool) -> None:
    import json

    from llmopt.optimizer.cache import cache_root
    from llmopt.optimizer.cli._console import open_console
    from llmopt.optimizer.contents import layers_of
    from llmopt.optimizer.sources import load_model

    model = load_model(spec, cache=cache_root())
    layers = layers_of(model, [])
    if as_json:
        shown = [layer.model_dump(mode="json", exclude={"error"}) for layer in layers]
        click.echo(json.dumps({"model": spec, "architecture": model.arch.name, "layers": shown}, indent=1))
        return
    console = open_console()
    console.print(f"model    {spec} ({model.arch.name})", soft_wrap=True)
    console.print(f"source   sha256 {model.source.digest}", soft_wrap=True)
    for note in model.source.notes:
        console.print(f"         {note}", soft_wrap=True)
    console.print()
    _print_layers(layers, console, every_layer=every_layer)


def _write_page(manifest: "Manifest", build: Path, html: Path) -> None:
    from llmopt.evaluation.report import page
    from llmopt.optimizer.build_record import read_record

    html.write_text(page(manifest, read_record(build)), encoding="utf-8")


def _print_graphs(manifest: "Manifest", console: "Console") -> None:
    from llmopt.evaluation.operators import effects_of
    from llmopt.optimizer.cli._tables import graph_passes_table, operators_table
    from llmopt.optimizer.errors import InputError

    for engine in manifest.all_engines:
        effects = effects_of(manifest.graph_passes.get(engine.path, []))
        if not effects:
            raise InputError(
                f"the manifest does not say how many operators {engine.path} has",
                hint="build it again with this llmopt",
            )
        console.print(graph_passes_table(engine.path, effects))
        for effect in effects:
            for reason, count in effect.declined.items():
                console.print(f"{effect.name} declined {count}: {reason}", soft_wrap=True)
        console.print(operators_table(effects[-1].after, engine.num_layers))


def _show(manifest: "Manifest", build: Path, console: "Console", *, every_layer: bool) -> None:
    from llmopt.optimizer.cli._network import print_network
    from llmopt.optimizer.cli._tables import gates_table, measurements_table

    console.print(f"model    {manifest.source.spec} ({manifest.architecture})", soft_wrap=True)
    console.print(f"source   sha256 {manifest.source.digest}", soft_wrap=True)
    for note in manifest.source.notes:
        console.print(f"         {note}", soft_wrap=True)
    for engine in manifest.engines:
        console.print(
            f"engine   {engine.path}: {engine.exporter} for {engine.target}, {engine.num_layers} layers, "
            f"up to {engine.capacity} tokens",
            soft_wrap=True,
        )
        print_network(engine, manifest, build, console, every_layer=every_layer)
        if engine.lora is not None:
            _print_adapters(engine.lora, build, console)
    for encoder in manifest.encoders:
        console.print(
            f"engine   {encoder.path}: {encoder.exporter} for {encoder.target}, {encoder.num_layers} layers, "
            f"texts up to {encoder.capacity} tokens",
            soft_wrap=True,
        )
        length = ", of length 1" if encoder.normalize else ""
        console.print(f"vectors  {encoder.hidden_size} columns, pooled by {encoder.pooling}{length}", soft_wrap=True)
        print_network(encoder, manifest, build, console, every_layer=every_layer)
    for checkpoint in manifest.checkpoints:
        console.print(f"files    {checkpoint.path}/: {checkpoint.format}, {checkpoint.dtype}", soft_wrap=True)
        for note in checkpoint.notes:
            console.print(f"         {note}", soft_wrap=True)
    if manifest.calibration is not None:
        console.print(f"text     {manifest.calibration.describe()}", soft_wrap=True)
    console.print()
    _print_layers(manifest.layers, console, every_layer=every_layer)
    _print_passes(manifest, console)
    if manifest.measurements:
        console.print(measurements_table(manifest.measurements))
    if manifest.verdict.gates:
        console.print(gates_table(manifest.verdict))
    else:
        console.print(f"verdict: {manifest.verdict.status} (the recipe has no gates)")
    if manifest.verdict.proxy is not None:
        console.print(f"measured: {manifest.verdict.proxy}", soft_wrap=True)


def _print_adapters(lora: "LoraSlots", build: Path, console: "Console") -> None:
    from llmopt.optimizer.lora.adapter_file import read_index

    console.print(
        f"adapters in {len(lora.modules)} linears, up to rank {lora.max_rank}, {lora.slots} in memory at once",
        soft_wrap=True,
    )
    for name, file in read_index(build).items():
        console.print(f"         {name}: rank {file.entry.rank} in {file.entry.modules} linears", soft_wrap=True)


def _print_layers(layers: "Sequence[Layer]", console: "Console", *, every_layer: bool) -> None:
    from rich.table import Table

    table = Table(title="linear layers", title_justify="left")
    table.add_column("layer", no_wrap=True)
    for name in ("n", "shape", "scheme", "MB", "error"):
        table.add_column(name, justify="left" if name in ("shape", "scheme") else "right")
    for row in _rows(layers, every_layer=every_layer):
        error = "" if row.error is None else f"{row.error:.4f}"
        table.add_row(row.label, str(row.count), row.shape, row.scheme, f"{row.size / 1e6:.2f}", error)
    total = sum(layer.bytes for layer in layers)
    table.add_section()
    table.add_row("all", str(len(layers)), "", "", f"{total / 1e6:.2f}", "")
    console.print(table)


@dataclass(frozen=True, slots=True)
class _Row:
    label: str
    count: int
    shape: str
    scheme: str
    size: int
    error: float | None


def _rows(every: "Sequence[Layer]", *, every_layer: bool) -> list[_Row]:
    """A row per layer, or per set of layers that differ only in their number: sizes summed, errors averaged."""
    groups: dict[tuple[str, str, str], list[Layer]] = {}
    for layer in every:
        parts = layer.name.split(".")
        label = layer.name if every_layer else ".".join("*" if part.isdigit() else part for part in parts)
        shape = "x".join(str(size) for size in layer.shape)
        groups.setdefault((label, shape, layer.scheme), []).append(layer)
    rows = []
    for (label, shape, scheme), layers in groups.items():
        errors = [layer.error for layer in layers if layer.error is not None]
        mean = sum(errors) / len(errors) if errors else None
        name = label if len(layers) > 1 else layers[0].name
        rows.append(_Row(name, len(layers), shape, scheme, sum(layer.bytes for layer in layers), mean))
    return rows


def _print_passes(manifest: "Manifest", console: "Console") -> None:
    from rich.table import Table

    from llmopt.calibration.coverage import coverage_words
    from llmopt.evaluation.operators import verification_of

    table = Table(title="passes", title_justify="left")
    for name in ("pass", "applied", "notes"):
        table.add_column(name)
    everything = [*manifest.passes, *(record for records in manifest.graph_passes.values() for record in records)]
    for record in everything:
        declined = record.details.get("declined") or []
        notes = [*(f"fallback: {text}" for text in record.fallbacks), *record.notes]
        notes += coverage_words(record.details["coverage"]) if "coverage" in record.details else []
        notes += [f"declined {len(declined)}: {declined[0]}"] if declined else []
        verified = verification_of([record])
        differences = [(value, layer, name) for layer, found in verified.items() for name, value in found.items()]
        if differences:
            value, layer, name = max(differences)
            notes.append(f"{len(verified)} layers; largest difference {value:.2g}: {layer}, {name}")
        if kept := record.details.get("verification"):
            part = max(kept, key=kept.__getitem__)
            notes.append(f"keeps the function: {len(kept)} parts; largest difference {kept[part]:.2g}: {part}")
        if record.name == "largest_activations":
            place = max(record.details, key=record.details.__getitem__)
            notes.append(f"the largest of all: {record.details[place]:,.0f}, in {place}")
        applied = str(record.details.get("applied", "yes" if record.changed else ""))
        table.add_row(record.name, applied, "\n".join(notes))
    console.print(table)
