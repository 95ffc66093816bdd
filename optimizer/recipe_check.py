"""Whether a recipe's parts exist and fit together: names, options, schemes on targets, gates, files."""

from pathlib import Path
from typing import Any, TypeVar

from llmopt.optimizer import loader
from llmopt.optimizer.contracts import Exporter, QuantPass, WeightPass
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.loader import Kind
from llmopt.optimizer.recipe import NamedExporter, NamedPass, Recipe, Settings
from llmopt.optimizer.recipe_errors import shown, validated
from llmopt.optimizer.recipe_text import Document, Keys
from llmopt.optimizer.target import Target

__all__ = ["checked"]

_Step = TypeVar("_Step", WeightPass, Exporter)
_Steps = list[tuple[int, str, _Step]]
"""Position in the list, name, object."""

_LISTS: dict[str, Kind] = {"passes": "passes", "export": "exporters"}


def checked(document: Document, base: Path) -> Recipe | None:
    """The recipe; None, with the reasons among the document's problems, when it cannot be built as written.

    Args:
        document: With ``--set`` and the environment applied.
        base: The recipe's directory.
    """
    data = document.data
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"must be a mapping (key: value), not {shown(data)}"
        document.problems.append(document.problem((), what, "llmopt init MODEL writes a recipe to start from"))
        return None
    plain = {key: value for key, value in data.items() if key not in _LISTS}
    settings = validated(Settings, plain, document, (), also=_LISTS)
    passes: _Steps[WeightPass] = _steps(document, "passes")
    exporters: _Steps[Exporter] = _steps(document, "export")
    _check_quantizers(document, passes, exporters)
    _check_exports(document, exporters)
    _check_gates(document, exporters)
    _check_files(document, base)
    if settings is None or document.problems:
        return None
    return Recipe(
        **dict(settings),
        passes=tuple(NamedPass(name, each) for _, name, each in passes),
        export=tuple(NamedExporter(name, each) for _, name, each in exporters),
        base=base,
    )


def _steps(document: Document, key: str) -> _Steps[Any]:
    """The objects that the list ``key`` names; items that are wrong are left out, with a problem each."""
    items = document.data.get(key, [])
    if not isinstance(items, list):
        hint = f"write {key}: [] for none" if items is None else "start each item with '- '"
        document.problems.append(document.problem((key,), f"must be a list, not {shown(items)}", hint))
        return []
    found = []
    for index, item in enumerate(items):
        named = _named(document, key, index, item)
        if named is not None and (step := _step(document, key, index, *named)) is not None:
            found.append((index, named[0], step))
    return found


def _named(document: Document, key: str, index: int, item: Any) -> tuple[str, Any] | None:
    """Name and options of one list item, which is ``name`` or ``name: {options}``."""
    if isinstance(item, str):
        return item, {}
    if isinstance(item, dict) and len(item) == 1:
        return next(iter(item.items()))
    path = (key, index)
    if not isinstance(item, dict) or not item:
        what = f"must be a name, or name: {{options}}, not {shown(item) if item else 'nothing'}"
        document.problems.append(document.problem(path, what))
        return None
    name, *others = item
    what = f"has {len(item)} keys, and an item names one thing: {', '.join(item)}"
    hint = f"indent the options of {name} further than its name" if item[name] is None else "give each its own '- '"
    document.problems.append(document.problem((*path, others[0]), what, hint, at_key=True))
    return None


def _step(document: Document, key: str, index: int, name: str, options: Any) -> Any:
    """The pass or exporter ``name`` with its options; None when something about it is wrong."""
    path = (key, index, name)
    try:
        found = loader.load(_LISTS[key], name)
    except InputError as error:
        hint = _elsewhere(_LISTS[key], name) or error.hint
        document.problems.append(document.problem((key, index), error.message, hint))
        return None
    if options is None:
        options = {}
    if not isinstance(options, dict):
        what = f"the options of {name} must be a mapping, not {shown(options)}"
        document.problems.append(document.problem(path, what, f"as in {name}: {{option: value}}"))
        return None
    return validated(found, options, document, path)


def _elsewhere(kind: Kind, name: str) -> str | None:
    """A hint for a name that exists in another place of a recipe."""
    if kind == "passes" and name in loader.names("exporters"):
        return f"{name} is an exporter: it belongs under export"
    if kind == "exporters" and name in loader.names("passes"):
        return f"{name} is a weight pass: it belongs under passes"
    if name in loader.names("passes.graph"):
        return f"{name} is a graph pass: a recipe does not name those, the export's target does"
    return None


def _check_quantizers(document: Document, passes: _Steps[WeightPass], exporters: _Steps[Exporter]) -> None:
    """One quantizing pass at most, and every scheme of it must run on every target."""
    quantizers = [(index, name, each) for index, name, each in passes if isinstance(each, QuantPass)]
    for index, name, _ in quantizers[1:]:
        what = f"its linears are already quantized by passes.{quantizers[0][0]}.{quantizers[0][1]}"
        hint = "keep one of them, and give some modules another scheme with its overrides"
        document.problems.append(document.problem(("passes", index, name), what, hint, at_key=True))
    targets = {target.name: target for _, _, exporter in exporters for target in exporter.targets()}
    for index, name, each in quantizers:
        for target in targets.values():
            _check_schemes(document, ("passes", index, name), each, target)


def _check_schemes(document: Document, path: Keys, quantizer: QuantPass, target: Target) -> None:
    """Report each scheme that ``target`` cannot run, at the option that names it.

    A scheme that no option names, such as a head's that follows from another option, is reported only when it is the
    only one that is wrong: else it is wrong for the same reason.
    """
    refused = {
        path + tuple(int(part) if part.isdigit() else part for part in option.split(".")): reason
        for option, scheme in quantizer.schemes().items()
        if (reason := target.refusal(scheme)) is not None
    }
    written = {each: reason for each, reason in refused.items() if each in document.places}
    for each, reason in (written or refused).items():
        document.problems.append(document.problem(each, reason))


def _check_exports(document: Document, exporters: _Steps[Exporter]) -> None:
    if document.data.get("export", []) == []:
        what = "nothing to export: a recipe names at least one exporter"
        document.problems.append(document.problem(("export",), what, "as in - onnx: {target: cpu}"))
    for position, (index, name, exporter) in enumerate(exporters):
        for earlier, _, other in exporters[:position]:
            if exporter == other:
                what = f"is the same as export.{earlier}.{name}"
                document.problems.append(document.problem(("export", index, name), what, "remove one", at_key=True))
                break


def _check_gates(document: Document, exporters: _Steps[Exporter]) -> None:
    """Gates are measured on an engine, so there has to be one."""
    written = document.data.get("export")
    is_complete = isinstance(written, list) and len(written) == len(exporters)
    if document.data.get("accept") and is_complete and not any(each.targets() for _, _, each in exporters):
        what = "nothing can be measured, because no item of export makes an engine"
        document.problems.append(document.problem(("accept",), what, "export an engine too, or remove the gates"))


def _check_files(document: Document, base: Path) -> None:
    """Every text a recipe names must be a file that is not empty. Looks at what is written, valid or not."""
    gates, calibration = document.data.get("accept"), document.data.get("calibration")
    named: list[tuple[Keys, Any]] = []
    if isinstance(gates, list):
        named += [(("accept", i, "data"), each.get("data")) for i, each in enumerate(gates) if isinstance(each, dict)]
    if isinstance(calibration, dict):
        named.append((("calibration", "source"), calibration.get("source")))
    for path, name in named:
        if not isinstance(name, str) or "${" in name:
            continue
        file = base / name
        if not file.is_file():
            what = f"{name} is {'a directory' if file.is_dir() else 'no file'}"
            document.problems.append(document.problem(path, what, f"paths are relative to {base.resolve()}"))
        elif file.stat().st_size == 0:
            document.problems.append(document.problem(path, f"{name} is empty"))
