"""Adapters of a build on disk: ``adapters/NAME.safetensors``, in the engine's layout, and ``adapters/index.json``.

The manifest stays what the build wrote: adapters come and go. Nothing here needs torch.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from llmopt.optimizer.cache import locked
from llmopt.optimizer.errors import InputError, VerificationError
from llmopt.optimizer.manifest import LoraSlots, sha256_of

__all__ = [
    "AdapterEntry",
    "AdapterFile",
    "ModuleFactors",
    "check_name",
    "publish_adapter",
    "read_index",
    "remove_adapter",
]

_FOLDER = "adapters"
_INDEX = "index.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class ModuleFactors:
    """What an adapter adds to a linear: ``y + x down^T up``.

    Attributes:
        down: Float32 ``[rank, inputs]``.
        up: Float32 ``[rank, outputs]``, with the scaling in it.
        bias: Float32 ``[outputs]``; None where nothing is added.
    """

    down: npt.NDArray[np.float32]
    up: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32] | None = None


class AdapterEntry(BaseModel):
    """An adapter in the index."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(description="Beside the index.")
    bytes: int
    sha256: str
    rank: int = Field(description="The largest of its ranks.")
    modules: int = Field(description="Linears that it changes.")
    trained_on: str | None = Field(None, description="What it says that its base is.")


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter as it is asked for.

    Attributes:
        name: What requests call it.
        path: Its file.
        entry: What it has to be.
    """

    name: str
    path: Path
    entry: AdapterEntry

    def read(self, lora: LoraSlots) -> dict[str, ModuleFactors]:
        """Its factors by linear.

        Raises:
            VerificationError: The file is missing, damaged, or was made for another engine.
        """
        try:
            if self.path.stat().st_size != self.entry.bytes or sha256_of(self.path) != self.entry.sha256:
                raise VerificationError(f"{self.path} was changed since it was added", hint="add the adapter again")
            tensors = load_file(self.path)
        except (OSError, SafetensorError) as error:
            raise VerificationError(f"{self.path} cannot be read: {error}", hint="add the adapter again") from error
        known = {module.name: module for module in lora.modules}
        factors = {}
        for name in {key.rpartition(".")[0] for key in tensors}:
            found = ModuleFactors(tensors[f"{name}.down"], tensors[f"{name}.up"], tensors.get(f"{name}.bias"))
            module = known.get(name)
            if module is None or not _fits(found, module.inputs, module.outputs, lora.max_rank):
                raise VerificationError(
                    f"{self.path} does not fit the engine: {name} is another linear there", hint="add the adapter again"
                )
            factors[name] = found
        return factors


def _fits(found: ModuleFactors, inputs: int, outputs: int, max_rank: int) -> bool:
    rank = len(found.down)
    return found.down.shape == (rank, inputs) and found.up.shape == (rank, outputs) and rank <= max_rank


def check_name(name: str) -> str:
    """A name that can be a file's and a model's.

    Raises:
        InputError: It cannot.
    """
    if _NAME.fullmatch(name) is None or name == Path(_INDEX).stem:
        raise InputError(
            f"{name!r} is no name for an adapter", hint="letters, digits, dots, dashes and underscores, e.g. support"
        )
    return name


def read_index(build: Path) -> dict[str, AdapterFile]:
    """The adapters of a build by name; their files are read when they are loaded.

    Raises:
        VerificationError: The index is damaged.
    """
    path = build / _FOLDER / _INDEX
    if not path.is_file():
        return {}
    try:
        entries: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))["adapters"]
        found = {name: AdapterEntry.model_validate(entry) for name, entry in entries.items()}
    except (ValueError, KeyError, AttributeError, TypeError, ValidationError) as error:
        raise VerificationError(f"{path} is damaged", hint="remove the folder and add its adapters again") from error
    return {name: AdapterFile(name, path.with_name(entry.file), entry) for name, entry in found.items()}


def write_adapter(
    name: str, path: Path, factors: Mapping[str, ModuleFactors], *, trained_on: str | None = None
) -> AdapterFile:
    """Write an adapter's file; it appears whole or not at all."""
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for module, found in factors.items():
        tensors |= {f"{module}.down": found.down, f"{module}.up": found.up}
        tensors |= {} if found.bias is None else {f"{module}.bias": found.bias}
    partial = path.with_name(f".{path.name}.partial")
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, partial)
    entry = AdapterEntry(
        file=path.name,
        bytes=partial.stat().st_size,
        sha256=sha256_of(partial),
        rank=max(len(found.down) for found in factors.values()),
        modules=len(factors),
        trained_on=trained_on,
    )
    partial.replace(path)
    return AdapterFile(name, path, entry)


def publish_adapter(
    build: Path, name: str, factors: Mapping[str, ModuleFactors], *, trained_on: str | None, force: bool = False
) -> AdapterFile:
    """Write an adapter into a build and its index.

    Raises:
        InputError: The name is no name, or taken and ``force`` is False.
    """
    with _changed_index(build) as adapters:
        if check_name(name) in adapters and not force:
            raise InputError(f"{build} has an adapter {name}", hint="--force replaces it, or choose another name")
        found = write_adapter(name, build / _FOLDER / f"{name}.safetensors", factors, trained_on=trained_on)
        adapters[name] = found
    return found


def remove_adapter(build: Path, name: str) -> None:
    """Take an adapter out of a build.

    Raises:
        InputError: It has none of that name.
    """
    with _changed_index(build) as adapters:
        if name not in adapters:
            raise InputError(f"{build} has no adapter {name}", hint=f"it has: {', '.join(sorted(adapters)) or 'none'}")
        removed = adapters.pop(name)
    removed.path.unlink(missing_ok=True)


@contextmanager
def _changed_index(build: Path) -> Iterator[dict[str, AdapterFile]]:
    """The adapters, to be changed while nobody else does; then the index is replaced."""
    folder = build / _FOLDER
    folder.mkdir(exist_ok=True)
    with locked(folder / ".index"):
        adapters = read_index(build)
        yield adapters
        entries = {name: adapters[name].entry.model_dump(mode="json") for name in sorted(adapters)}
        partial = folder / f".{_INDEX}.partial"
        partial.write_text(json.dumps({"adapters": entries}, indent=1) + "\n", encoding="utf-8")
        partial.replace(folder / _INDEX)
