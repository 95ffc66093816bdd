"""Whether a recipe's parts fit together: one quantizer, schemes on targets, gates, files."""

from pathlib import Path
from typing import Any

from llmopt.optimizer.calibration import is_dataset
from llmopt.optimizer.contracts import Exporter, QuantPass
from llmopt.optimizer.recipe import NamedExporter, NamedPass, Recipe, Settings
from llmopt.optimizer.recipe_errors import shown, validated
from llmopt.optimizer.recipe_steps import LISTS, Step, steps
from llmopt.optimizer.recipe_text import Document, Keys, dotted

__all__ = ["checked"]


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
    settings = validated(
        Settings, {key: value for key, value in data.items() if key not in LISTS}, document, (), also=LISTS
    )
    passes, export = (steps(document, key, base) for key in LISTS)
    _check_quantizers(document, passes, export)
    _check_order(document, passes)
    _check_exports(document, export)
    _check_files(document, base)
    if settings is None or document.problems:
        return None
    return Recipe(
        **dict(settings),
        passes=tuple(NamedPass(each.name, each.instance) for each in passes),
        export=tuple(NamedExporter(each.name, each.instance) for each in export),
        base=base,
    )


def _check_quantizers(document: Document, passes: list[Step], export: list[Step]) -> None:
    """One pass that rounds at most, and everything that is exported must have a place for what passes make."""
    exporters = [each for each in export if each.instance]
    first: Step | None = None
    for each in passes:
        if not issubclass(each.kind, QuantPass):
            continue
        if first is not None:
            what = f"its linears are already quantized by {dotted(first.path)}"
            hint = "keep one of them, and give some modules another scheme with its overrides"
            document.problems.append(document.problem(each.path, what, hint, at_key=True))
        if each.instance and each.instance.leaves_floats:
            continue
        first = first or each
        for exporter in exporters:
            if each.instance:
                _check_schemes(document, each.path, each.instance, exporter.instance)
    for each in passes:
        for exporter in exporters:
            if each.instance:
                _check_features(document, each, exporter)


def _check_order(document: Document, passes: list[Step]) -> None:
    """What was trained on the source model goes into that, or behind passes that record how they change it."""
    for number, step in enumerate(passes):
        if not step.kind.trained_on_source:
            continue
        for before in passes[:number]:
            one = before.instance
            if one and not (one.dequantizes or one.records_bases or one.trained_on_source):
                what = f"{before.name} before it changes the weights that its adapters were trained on"
                hint = f"put {step.name} in front of {before.name}"
                document.problems.append(document.problem(step.path, what, hint, at_key=True))


def _check_features(document: Document, step: Step, exporter: Step) -> None:
    """Report what a pass adds to a model and an exporter cannot write."""
    for feature in sorted(step.instance.adds - exporter.instance.holds):
        what = f"it makes {feature}, which {exporter.name} has no place for"
        document.problems.append(
            document.problem(step.path, what, f"leave out the option or the pass, or {dotted(exporter.path)}")
        )


def _check_schemes(document: Document, path: Keys, quantizer: QuantPass, exporter: Exporter) -> None:
    """Report each scheme that what ``exporter`` writes cannot have, at the option that names it.

    A scheme that no option names, such as a head's that follows from another option, is reported only when it is the
    only one that is wrong: else it is wrong for the same reason.
    """
    refused = {
        path + tuple(int(part) if part.isdigit() else part for part in option.split(".")): reason
        for option, scheme in quantizer.schemes().items()
        if (reason := exporter.refusal(scheme, experts=option == "experts")) is not None
    }
    if (*path, "experts") not in document.places:  # most models have none; model_check looks
        refused.pop((*path, "experts"), None)
    written = {each: reason for each, reason in refused.items() if each in document.places}
    for each, reason in (written or refused).items():
        document.problems.append(document.problem(each, reason))


def _check_exports(document: Document, export: list[Step]) -> None:
    if document.data.get("export", []) == []:
        what = "nothing to export: a recipe names at least one exporter"
        document.problems.append(document.problem(("export",), what, "as in - onnx: {target: cpu}"))
    first: dict[str, Step] = {}
    for each in export:
        folder = each.instance.folder if each.instance else each.name
        if (other := first.setdefault(folder, each)) is not each:
            what = f"this kind is exported already, by {dotted(other.path)}"
            hint = "remove one: a build holds one export of each kind"
            document.problems.append(document.problem(each.path, what, hint, at_key=True))


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
        if not file.is_file() and path[0] == "calibration" and is_dataset(name):
            continue
        if not file.is_file():
            what = f"{name} is a directory" if file.is_dir() else f"there is no file {name}"
            document.problems.append(document.problem(path, what, f"paths are relative to {base.resolve()}"))
        elif file.stat().st_size == 0:
            document.problems.append(document.problem(path, f"{name} is empty"))
