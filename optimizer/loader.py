"""Finds passes, graph passes and exporters by file name, and imports only the one that is asked for.

A file of ``passes/``, ``passes/graph/`` or ``exporters/`` is found by existing; nothing is registered. Files whose
name starts with an underscore are not looked at. An exporter may also be a folder with an ``exporter.py`` in it.
Other distributions add weight passes through the entry-point group ``llmopt.passes``, as ``name = "module"`` or
``name = "module:Class"``.
"""

import ast
import difflib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmopt.optimizer.errors import InputError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["ENTRY_POINT_GROUP", "Kind", "first_line", "load", "names", "nearest"]

Kind = Literal["passes", "passes.graph", "exporters"]

ENTRY_POINT_GROUP = "llmopt.passes"

_ROOT = Path(__file__).parent.parent
_NOUNS: dict[Kind, str] = {"passes": "pass", "passes.graph": "graph pass", "exporters": "exporter"}


@dataclass(frozen=True, slots=True)
class _OwnFile:
    """A file of llmopt itself."""

    module: str
    path: Path

    def summary(self) -> str:
        return first_line(self.path)

    def load(self) -> Any:
        module = importlib.import_module(self.module)
        public = module.__all__
        if len(public) != 1:
            raise TypeError(f"{self.module} must have exactly one name in __all__, not {len(public)}")
        return getattr(module, public[0])


@dataclass(frozen=True, slots=True)
class _Plugin:
    """An entry point of another distribution."""

    entry: "EntryPoint"

    @property
    def distribution(self) -> str:
        return self.entry.dist.name if self.entry.dist else "an unknown distribution"

    def summary(self) -> str:
        relative = self.entry.module.replace(".", "/")
        for candidate in (f"{relative}.py", f"{relative}/__init__.py"):
            path = Path(str(self.entry.dist.locate_file(candidate))) if self.entry.dist else None
            if path is not None and path.is_file():
                return first_line(path)
        return f"From the distribution {self.distribution}."

    def load(self) -> Any:
        try:
            loaded = self.entry.load()
        except Exception as error:
            raise InputError(
                f"the pass {self.entry.name!r} of {self.distribution} cannot be imported: "
                f"{type(error).__name__}: {error}",
                hint=f"repair or uninstall {self.distribution}",
            ) from error
        if self.entry.attr:
            return loaded
        public: list[str] = list(getattr(loaded, "__all__", []))
        if len(public) != 1:
            raise InputError(
                f"{self.entry.module} of {self.distribution} must have exactly one name in __all__, not {len(public)}",
                hint="name the class in the entry point, as module:Class",
            )
        return getattr(loaded, public[0])


def names(kind: Kind) -> dict[str, str]:
    """Every name a recipe may use for ``kind``, with the first line of its file's docstring, sorted by name.

    Nothing is imported.

    Raises:
        InputError: A third-party pass has the name of another pass.
    """
    return {name: found.summary() for name, found in sorted(_find(kind).items())}


def load(kind: Kind, name: str) -> type[Any]:
    """Import the one file called ``name`` and return the class it defines.

    Raises:
        InputError: No such name, a name taken twice, or a third-party pass that cannot be imported or is no pass.
    """
    found = _find(kind)
    if name not in found:
        raise InputError(f"no {_NOUNS[kind]} named {name!r}", hint=nearest(name, found))
    loaded = found[name].load()
    base = _base_class(kind)
    described = f"{getattr(loaded, '__module__', '?')}.{getattr(loaded, '__qualname__', loaded)}"
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        message = f"the {_NOUNS[kind]} {name!r} is {described}, which is no {base.__name__}"
    elif abstract := sorted(getattr(loaded, "__abstractmethods__", ())):
        message = f"the {_NOUNS[kind]} {name!r} is {described}, which lacks {', '.join(abstract)}"
    else:
        return loaded
    if isinstance(found[name], _OwnFile):
        raise TypeError(message)
    raise InputError(message, hint=f"a {_NOUNS[kind]} is a class derived from llmopt's {base.__name__}")


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """A hint for a name that is not in ``known``: the closest one, else all of them."""
    candidates = sorted(known)
    folded = {candidate.lower().replace("-", "_"): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), folded, n=1, cutoff=cutoff)
    if close:
        return f"did you mean {folded[close[0]]!r}?"
    return f"known: {', '.join(candidates)}" if candidates else "none is installed"


def first_line(path: Path) -> str:
    """The first line of a Python file's docstring, read without importing it; empty when there is none."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def _find(kind: Kind) -> dict[str, _OwnFile | _Plugin]:
    found: dict[str, _OwnFile | _Plugin] = dict(_own_files(kind))
    if kind != "passes":
        return found
    for entry in _entry_points():
        plugin = _Plugin(entry)
        if (other := found.get(entry.name)) is not None:
            owner = other.distribution if isinstance(other, _Plugin) else "llmopt itself"
            raise InputError(
                f"the pass name {entry.name!r} is taken twice: by {owner} and by {plugin.distribution}",
                hint=f"uninstall {plugin.distribution} or rename its entry point",
            )
        found[entry.name] = plugin
    return found


def _own_files(kind: Kind) -> dict[str, _OwnFile]:
    folder = _ROOT.joinpath(*kind.split("."))
    found = {}
    for path in sorted(folder.glob("[!_]*.py")):
        found[path.stem] = _OwnFile(f"llmopt.{kind}.{path.stem}", path)
    if kind == "exporters":
        for path in sorted(folder.glob("[!_]*/exporter.py")):
            found[path.parent.name] = _OwnFile(f"llmopt.{kind}.{path.parent.name}.exporter", path)
    return found


def _entry_points() -> list["EntryPoint"]:
    from importlib.metadata import entry_points

    return sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name)


def _base_class(kind: Kind) -> type[Any]:
    from llmopt.optimizer import contracts

    bases: dict[Kind, type[Any]] = {
        "passes": contracts.WeightPass,
        "passes.graph": contracts.GraphPass,
        "exporters": contracts.Exporter,
    }
    return bases[kind]
