"""A build's report for people, ``report.html``, and the same facts for programs, ``report.json``."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmopt.calibration.coverage import coverage_words
from llmopt.evaluation.choices import choices_of
from llmopt.evaluation.operators import KINDS, WHOLE, Effect, by_kind, effects_of, verification_of
from llmopt.evaluation.pages import Segment, measured, megabytes, rendered, segments
from llmopt.optimizer.manifest import EncoderEngine, Engine, GateResult, Layer, Manifest, Measurement, PassRecord
from llmopt.optimizer.scheme import Scheme
from llmopt.optimizer.tokens import SAMPLED

__all__ = ["page", "summary", "write_report"]

_KEPT = (
    "llmopt",
    "versions",
    "source",
    "recipe",
    "architecture",
    "calibration",
    "layers",
    "sizes",
    "passes",
    "measurements",
    "files",
)


def write_report(manifest: Manifest, directory: Path) -> None:
    """Write ``report.json`` and ``report.html`` into a build.

    Both follow from the manifest alone, so they are as deterministic as it is. Written before the build's files are
    listed, they are listed with them.

    Args:
        manifest: Its ``files`` may still be empty.
        directory: The build.
    """
    text = json.dumps(summary(manifest), indent=1, sort_keys=True)
    (directory / "report.json").write_text(text + "\n", encoding="utf-8")
    (directory / "report.html").write_text(page(manifest), encoding="utf-8")


def page(manifest: Manifest, record: Mapping[str, Any] | None = None) -> str:
    """The report as one HTML page that loads nothing.

    Args:
        manifest: Of the build.
        record: Its ``build-record.json``: what it cost on the machine it was made on. Left out of ``report.html``,
            which is the same on every machine.
    """
    facts = summary(manifest)
    return rendered(
        "report.html",
        {
            **facts,
            "record": record,
            "name": manifest.source.spec.rstrip("/").rpartition("/")[2],
            "engines": manifest.all_engines,
            "engine_bytes": sum(map(manifest.bytes_of, manifest.all_engines)),
            "accuracy": [_accuracy(found, manifest.verdict.gates) for found in manifest.measurements],
            "bars": {
                "part": _size_bar({part: sum(found.values()) for part, found in manifest.sizes.items()}),
                "scheme": _size_bar({entry["scheme"]: entry["bytes"] for entry in facts["schemes"]}),
            },
            "graphs": [
                {
                    **graph,
                    **_plot(effects_of(manifest.graph_passes.get(graph["engine"], ()))),
                    "checks": _checks(graph["verification"], graph["passes"]),
                }
                for graph in facts["graphs"]
            ],
            "steps": [{**step, "options": _short(step["options"])} for step in facts["passes"]],
            "calibration_text": manifest.calibration.describe() if manifest.calibration else None,
            "coverages": [
                {"name": record.name, "words": coverage_words(record.details["coverage"]), **record.details["coverage"]}
                for record in manifest.passes
                if "coverage" in record.details
            ],
            "checkpoints": manifest.checkpoints,
            "choices": [
                {"name": record.name, "made": choices_of(record.details["pareto"])}
                for record in manifest.passes
                if record.details.get("pareto")
            ],
            "recipe_text": json.dumps(_short(manifest.recipe), indent=1, sort_keys=True),
        },
    )


def summary(manifest: Manifest) -> dict[str, Any]:
    """What the report shows, as plain data."""
    plain = manifest.model_dump(mode="json")
    return {
        **{name: plain[name] for name in _KEPT},
        "title": f"{manifest.architecture} model from {manifest.source.spec}",
        "status": manifest.verdict.status,
        "gates": plain["verdict"]["gates"],
        "schemes": _by_scheme(manifest.layers),
        "total_bytes": sum(layer.bytes for layer in manifest.layers),
        "graphs": [_graph(engine, manifest.graph_passes.get(engine.path, [])) for engine in manifest.all_engines],
    }


def _by_scheme(layers: list[Layer]) -> list[dict[str, Any]]:
    """Number and size of the layers of each scheme, the largest first; ``share`` is of all bytes."""
    total = sum(layer.bytes for layer in layers) or 1
    found: dict[str, list[int]] = {}
    for layer in layers:
        found.setdefault(layer.scheme, []).append(layer.bytes)
    rows = [
        {"scheme": scheme, "layers": len(sizes), "bytes": sum(sizes), "share": sum(sizes) / total}
        for scheme, sizes in found.items()
    ]
    return sorted(rows, key=lambda row: (-row["bytes"], row["scheme"]))


def _graph(engine: Engine | EncoderEngine, records: Sequence[PassRecord]) -> dict[str, Any]:
    """The graph passes of one engine: what each did to the operators, and how verification went."""
    effects = effects_of(records)
    final = effects[-1].after if effects else {}
    return {
        "engine": engine.path,
        "layers": engine.num_layers,
        "standard": dict(effects[0].before) if effects else {},
        "passes": [
            {
                "name": effect.name,
                "applied": effect.applied,
                "declined": dict(effect.declined),
                "operators": sum(effect.after.values()),
                "changes": effect.changes,
            }
            for effect in effects
        ],
        "final": dict(sorted(final.items(), key=lambda item: (-item[1], item[0]))),
        "verification": verification_of(records),
        "fallbacks": [f"{record.name}: {text}" for record in records for text in record.fallbacks],
        "notes": [f"{record.name}: {text}" for record in records for text in record.notes],
    }


def _plot(effects: Sequence[Effect]) -> dict[str, Any]:
    """A bar for the standard graph and one behind each pass, coloured by what the operators do."""
    if not effects:
        return {"rows": [], "legend": []}
    graphs = [effects[0].before, *(effect.after for effect in effects)]
    longest = max(sum(graph.values()) for graph in graphs)
    rows = [
        {"effect": effect, "operators": sum(graph.values()), "bar": segments(by_kind(graph), KINDS, total=longest)}
        for effect, graph in zip([None, *effects], graphs, strict=True)
    ]
    return {"rows": rows, "legend": segments(dict.fromkeys(KINDS, 1), KINDS, total=len(KINDS))}


def _checks(
    verification: Mapping[str, Mapping[str, float]], passes: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row per graph pass that was verified: its largest difference, and a strip with a field per layer."""
    order = [each["name"] for each in passes]
    names = dict.fromkeys(name for found in verification.values() for name in found)
    rows = []
    for name in sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name == WHOLE)):
        found = {layer: differences[name] for layer, differences in verification.items() if name in differences}
        worst = max(found, key=lambda layer: found[layer])
        strip = segments(dict.fromkeys(found, 1), list(found), total=len(found), colours=("c0",))
        fields = [{"segment": field, "value": found[field.name], "shade": _shade(found[field.name])} for field in strip]
        rows.append({"name": name, "layers": len(found), "largest": found[worst], "worst": worst, "fields": fields})
    return rows


def _shade(difference: float) -> float:
    """Opacity of a field: none for equal, all for a difference of 1e-4 and more, and logarithmic between."""
    return 0.0 if difference <= 0 else round(min(1.0, max(0.15, (math.log10(difference) + 9) / 5)), 2)


def _size_bar(sizes: Mapping[str, int]) -> list[Segment]:
    """The largest part first."""
    total = sum(sizes.values())
    order = sorted(sizes, key=lambda name: -sizes[name])
    texts = {name: f"{megabytes(size)}, {size / total:.1%}" for name, size in sizes.items() if size}
    return segments(sizes, order, total=total, texts=texts)


def _accuracy(found: Measurement, gates: Sequence[GateResult]) -> dict[str, Any]:
    """One measurement as it is shown, with the gates that judged it."""
    change = "" if found.source is None else f"{found.value / found.source - 1:+.2%}"
    judged = [
        result
        for result in gates
        if (result.gate["metric"], result.gate.get("data", SAMPLED), result.value)
        == (found.metric, found.data, found.value)
    ]
    return {
        "metric": found.metric,
        "value": measured(found.metric, found.value),
        "source": "" if found.source is None else measured(found.metric, found.source),
        "change": change,
        "text": found.data,
        "tokens": found.tokens,
        "limits": [_limit(result, found) for result in judged],
    }


def _limit(result: GateResult, found: Measurement) -> dict[str, Any]:
    """A gate in words, and how much of the loss it allows was used: 1 is the limit itself."""
    kind = next(name for name in ("max", "min", "max_increase") if name in result.gate)
    limit = float(result.gate[kind])
    if kind == "min":
        lost, allowed = 1 - found.value, 1 - limit
        words = f"at least {limit:.1%}" if found.metric == "top1" else f"at least {limit:g}"
    elif kind == "max":
        lost, allowed, words = found.value, limit, f"at most {limit:g}"
    else:
        lost, allowed = found.value / (found.source or found.value) - 1, limit
        words = f"at most {limit:+.1%}"
    used = max(0.0, lost) / allowed if allowed else float(lost > 0)
    return {"words": words, "used": used, "passed": result.passed}


def _short(options: Any) -> Any:
    """Options with the name of a scheme in the place of its long form."""
    if isinstance(options, list):
        return [_short(each) for each in options]
    if not isinstance(options, dict):
        return options
    if "weights" in options and options.keys() <= Scheme.model_fields.keys():
        return Scheme.model_validate(options).name
    return {name: _short(value) for name, value in options.items()}
