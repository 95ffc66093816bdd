"""What a build keeps of its model so that adapters can be fitted to it later: names, shapes, and what passes did."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch

from llmopt.optimizer import arch
from llmopt.optimizer.basis_file import read_bases, save_bases
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.model import DenseWeight, Model, Source

__all__ = ["read_base", "save_base"]

_FOLDER = "lora"
_DESCRIPTION = "base.json"
_BASES = "bases.safetensors"


def save_base(model: Model, directory: Path) -> None:
    """Write ``lora/`` into a build's ``directory``."""
    folder = directory / _FOLDER
    folder.mkdir()
    description = {
        "spec": model.source.spec,
        "family": model.family.name,
        "config": dict(model.config),
        "shapes": {name: list(weight.shape) for name, weight in sorted(model.weights.items())},
    }
    text = json.dumps(description, indent=1, sort_keys=True)
    (folder / _DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    save_bases(model.bases, folder / _BASES)


def read_base(directory: Path) -> Model:
    """The model of a build that takes adapters; its weights have shapes, and no values.

    Raises:
        InputError: The build takes none.
    """
    folder = directory / _FOLDER
    if not (folder / _DESCRIPTION).is_file():
        raise InputError(
            f"{directory} takes no adapters", hint="build it with lora: {} among the options of onnx in export:"
        )
    description: Mapping[str, Any] = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
    weights = {name: DenseWeight(tuple(shape), torch.float32, _unread) for name, shape in description["shapes"].items()}
    return Model(
        family=next(family for family in arch.known() if family.name == description["family"]),
        config=description["config"],
        weights=MappingProxyType(weights),
        source=Source(description["spec"], "", {}, directory),
        bases=read_bases(folder / _BASES),
    )


def _unread() -> NoReturn:
    raise AssertionError("a build's adapters are fitted to shapes, not to weights")
