"""What ``llmopt inspect`` shows of TensorRT engines, from what was written when they were compiled."""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from llmopt.optimizer.manifest import EncoderEngine, Engine, Manifest

__all__ = ["print_network"]


def print_network(
    engine: "Engine | EncoderEngine", manifest: "Manifest", build: Path, console: "Console", *, every_layer: bool
) -> None:
    """Print an engine's files, profiles, bindings and layers; nothing of an engine that TensorRT did not compile."""
    if not engine.compiled:
        return
    for gpu, path in engine.compiled.items():
        console.print(f"         {gpu}: {path}, {manifest.files[path].bytes / 1e6:.1f} MB", soft_wrap=True)
    network = json.loads((build / engine.path).with_name("network.json").read_text("utf-8"))
    console.print(f"         compiled by {network['package']} {network['version']}", soft_wrap=True)
    console.print(_profiles(network))
    console.print(_bindings(engine))
    console.print(_every_layer(network) if every_layer else _layers(network))


def _profiles(network: dict[str, Any]) -> Table:
    table = Table(title="profiles: least, usual and greatest size", title_justify="left")
    dims = list(next(iter(network["profiles"].values())))
    for name in ("profile", *dims):
        table.add_column(name)
    for name, sizes in network["profiles"].items():
        table.add_row(name, *(" ".join(map(str, sizes[dim])) for dim in dims))
    return table


def _bindings(engine: "Engine | EncoderEngine") -> Table:
    """Inputs and outputs; caches, of which every layer has four that are alike, in one row."""
    table = Table(title="bindings", title_justify="left")
    for name in ("tensor", "dtype", "shape"):
        table.add_column(name)
    caches = [info for info in engine.inputs if info.name.startswith("past.")]
    rows = [(info.name, info) for info in engine.inputs if info not in caches]
    rows += [(f"past.* and present.*, {len(caches)} times", info) for info in caches[:1]]
    rows += [(info.name, info) for info in engine.outputs if not info.name.startswith("present.")]
    for name, info in rows:
        table.add_row(name, info.dtype, " x ".join(map(str, info.dims)))
    return table


def _layers(network: dict[str, Any]) -> Table:
    """A row for each type of layer and number."""
    counts = Counter((layer["type"], layer["dtype"]) for layer in network["layers"])
    table = Table(title=f"layers of the parsed network: {len(network['layers'])}", title_justify="left")
    for name in ("layer", "dtype", "n"):
        table.add_column(name, justify="right" if name == "n" else "left")
    for (kind, dtype), count in sorted(counts.items(), key=lambda item: -item[1]):
        table.add_row(kind, dtype, str(count))
    return table


def _every_layer(network: dict[str, Any]) -> Table:
    table = Table(title="layers of the parsed network", title_justify="left")
    for name in ("name", "layer", "dtype"):
        table.add_column(name, overflow="fold")
    for layer in network["layers"]:
        table.add_row(layer["name"], layer["type"], layer["dtype"])
    return table
