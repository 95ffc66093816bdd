"""One declarative file per model family, found by the architecture's name in ``config.json`` or in a GGUF file."""

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llmopt.optimizer.errors import UnsupportedError

if TYPE_CHECKING:
    from llmopt.optimizer.arch.base import Arch

__all__ = ["find", "find_gguf", "known"]


def known() -> "list[Arch]":
    """Every family llmopt can compile, by file name."""
    files = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    names = [name for name in files if not name.startswith("_") and name != "base"]
    return [importlib.import_module(f"{__name__}.{name}").ARCH for name in names]


def find(config: Mapping[str, Any]) -> "Arch":
    """The family of a checkpoint with this ``config.json``; without ``architectures`` its ``model_type`` decides.

    Raises:
        UnsupportedError: No file of this folder covers it.
    """
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        wanted = str(architectures[0])
        return _find(wanted, lambda arch: arch.models, "architecture")
    return _find(str(config.get("model_type", "")), lambda arch: arch.models.values(), "model type")


def find_gguf(name: str) -> "Arch":
    """The family of a GGUF file whose ``general.architecture`` is ``name``.

    Raises:
        UnsupportedError: No file of this folder covers it.
    """
    return _find(name, lambda arch: (arch.gguf,) if arch.gguf else (), "GGUF architecture")


def _find(wanted: str, names_of: "Callable[[Arch], Iterable[str]]", kind: str) -> "Arch":
    by_name: dict[str, Arch] = {}
    for arch in known():
        for name in names_of(arch):
            by_name.setdefault(name, arch)
    if wanted not in by_name:
        _refuse(wanted, sorted(by_name), kind)
    return by_name[wanted]


def _refuse(wanted: str, supported: list[str], kind: str) -> NoReturn:
    near = difflib.get_close_matches(wanted, supported, n=1, cutoff=0.6)
    guess = f"the nearest is {near[0]}; " if near else ""
    raise UnsupportedError(
        f"{kind} {wanted or '(none named)'} is not supported",
        hint=f"{guess}supported: {', '.join(supported)}; a family is one file in optimizer/arch/",
    )
