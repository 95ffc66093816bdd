"""Bases on disk: one safetensors file, each tensor and each rotation in it once."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llmopt.optimizer.basis import Basis, Scaled, Shifted, Turned
from llmopt.optimizer.rotation import Rotation
from llmopt.optimizer.weight_store import save_tensors

__all__ = ["read_bases", "save_bases"]

_Change = Scaled | Turned | Shifted


def save_bases(bases: Mapping[str, Basis], path: Path) -> None:
    """Write ``bases``, by module, as a new file."""
    writer = _Writer()
    entries = {
        module: {"columns": list(map(writer.entry, basis.columns)), "rows": list(map(writer.entry, basis.rows))}
        for module, basis in bases.items()
    }
    description = {"bases": entries, "rotations": writer.rotations}
    save_tensors(writer.tensors, path, {"description": json.dumps(description)})


def read_bases(path: Path) -> dict[str, Basis]:
    """What ``save_bases`` wrote."""
    with safe_open(path, framework="pt") as file:
        description: dict[str, Any] = json.loads(file.metadata()["description"])
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    rotations = [
        Rotation(tensors[entry["signs"]], tuple(tensors[name] for name in entry["factors"]), entry["keeps_mean"])
        for entry in description["rotations"]
    ]

    def changes(entries: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
        return tuple(_change(entry, tensors, rotations) for entry in entries)

    return {
        module: Basis(columns=changes(entry["columns"]), rows=changes(entry["rows"]))
        for module, entry in description["bases"].items()
    }


class _Writer:
    """Gives a name to every tensor and a number to every rotation, the same to the same object."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.rotations: list[dict[str, Any]] = []
        self._names: dict[int, str] = {}
        self._numbers: dict[int, int] = {}

    def entry(self, change: _Change) -> dict[str, Any]:
        if isinstance(change, Scaled):
            return {"kind": "scaled", "factors": self._name(change.factors)}
        if isinstance(change, Shifted):
            return {"kind": "shifted", "values": self._name(change.values)}
        return {"kind": "turned", "rotation": self._number(change.rotation), "spans": change.spans}

    def _name(self, tensor: Tensor) -> str:
        if id(tensor) not in self._names:
            name = self._names[id(tensor)] = str(len(self.tensors))
            self.tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
        return self._names[id(tensor)]

    def _number(self, rotation: Rotation) -> int:
        if id(rotation) not in self._numbers:
            self._numbers[id(rotation)] = len(self.rotations)
            names = [self._name(factor) for factor in rotation.factors]
            self.rotations.append(
                {"signs": self._name(rotation.signs), "factors": names, "keeps_mean": rotation.keeps_mean}
            )
        return self._numbers[id(rotation)]


def _change(entry: Mapping[str, Any], tensors: Mapping[str, Tensor], rotations: Sequence[Rotation]) -> _Change:
    if entry["kind"] == "scaled":
        return Scaled(tensors[entry["factors"]])
    if entry["kind"] == "shifted":
        return Shifted(tensors[entry["values"]])
    spans = entry["spans"]
    return Turned(rotations[entry["rotation"]], spans and tuple((first, past_end) for first, past_end in spans))
