"""Weights on disk between two passes: written a few at a time, mapped while they are in use."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmopt.optimizer.model import DenseWeight, QuantTensors, QuantWeight, Weight
from llmopt.optimizer.scheme import Scheme
from llmopt.optimizer.tensor_file import DTYPES, FileTensor, read_header

__all__ = ["WeightStore", "read_weights", "save_tensors"]

_INDEX = "weights.json"


class WeightStore:
    """Writes weights into a directory, one safetensors file per call, and an index when closed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._index: dict[str, dict[str, Any]] = {}
        self._kept: dict[str, Weight] = {}
        self._files = 0

    def keep(self, weights: Mapping[str, Weight]) -> Mapping[str, Weight]:
        """Write ``weights`` and return them as they lie in the file. See ``PassContext.keep``."""
        file = f"{self._files:05d}.safetensors"
        self._files += 1
        tensors: dict[str, Tensor] = {}
        for name, weight in weights.items():
            tensors |= _tensors(name, weight)
            self._index[name] = {"file": file}
            if isinstance(weight, QuantWeight):
                self._index[name]["scheme"] = weight.scheme.model_dump(mode="json")
        save_tensors(_separate(tensors), self._directory / file)
        written = read_header(self._directory / file)
        kept = {name: _weight(name, self._index[name], written) for name in weights}
        self._kept |= kept
        return kept

    def holds(self, name: str, weight: Weight) -> bool:
        """Whether ``weight`` is what was kept as ``name`` last."""
        return self._kept.get(name) is weight

    def close(self) -> None:
        """Write the index."""
        (self._directory / _INDEX).write_text(json.dumps(self._index, sort_keys=True), encoding="utf-8")


def read_weights(directory: Path) -> dict[str, Weight]:
    """All weights of a closed store; only headers are read."""
    index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
    files = {file: read_header(directory / file) for file in {entry["file"] for entry in index.values()}}
    return {name: _weight(name, entry, files[entry["file"]]) for name, entry in index.items()}


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Safetensors' ``save_file``, whose own exception hides the number of the system's error.

    Raises:
        OSError: The disk is full, or another error of the system.
    """
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous and each in memory of its own, as safetensors asks for."""
    separate: dict[str, Tensor] = {}
    used: set[int] = set()
    for name, tensor in tensors.items():
        dense = tensor.contiguous()
        separate[name] = dense.clone() if dense.untyped_storage().data_ptr() in used else dense
        used.add(separate[name].untyped_storage().data_ptr())
    return separate


def _tensors(name: str, weight: Weight) -> dict[str, Tensor]:
    if isinstance(weight, DenseWeight):
        return {name: weight.load()}
    parts = weight.load()._asdict()
    return {f"{name}.{part}": tensor for part, tensor in parts.items() if isinstance(tensor, Tensor)}


def _weight(name: str, entry: Mapping[str, Any], tensors: Mapping[str, FileTensor]) -> Weight:
    if "scheme" not in entry:
        tensor = tensors[name]
        return DenseWeight(tensor.shape, DTYPES[tensor.dtype], tensor)
    scheme = Scheme.model_validate(entry["scheme"])
    values, scale = tensors[f"{name}.values"], tensors[f"{name}.scale"]
    others = {part: tensors.get(f"{name}.{part}") for part in ("zero", "input_scale", "group_index")}

    def load() -> QuantTensors:
        read = {part: None if tensor is None else tensor() for part, tensor in others.items()}
        return QuantTensors(values(), scale(), block=scheme.weights.block_structure, **read)

    rows, columns = values.shape
    return QuantWeight((rows, columns), scheme, load, others["group_index"] is not None)
