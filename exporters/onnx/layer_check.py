"""One layer of a model behind every graph pass: what verifying decoders and encoders has in common."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import onnx_ir as ir

from llmopt.exporters.onnx.lowering import Stage
from llmopt.exporters.onnx.sessions import Sessions
from llmopt.optimizer.errors import MissingExtraError, VerificationError, is_out_of_memory
from llmopt.optimizer.model import DenseWeight, QuantWeight, Weight
from llmopt.optimizer.target import HALF

__all__ = [
    "HALF_LIMIT",
    "LIMIT",
    "ROUNDED_LIMIT",
    "WHOLE",
    "Level",
    "Result",
    "chosen_layers",
    "compare_stages",
    "first_rows",
    "hint_for",
    "limits",
]

Level = Literal["none", "quick", "full"]

LIMIT = 1e-4
"""Accepted ``rms(difference) / std(logits)`` of a row: float kernels only order their sums differently."""

HALF_LIMIT = 1e-2
"""The same where float32 becomes 16 bits: a layer rounds some twenty times in a row to numbers that are 2^-11 apart,
and a router between two experts may choose the other one.
Where activations are rounded to integers as well, some of every row round the other way, and on the scale of an outlier
each of them moves the row by a tenth: then only gross mistakes show here, and the measured divergence judges."""

ROUNDED_LIMIT = 0.1
"""The same of a single row where activations are rounded. An activation on the border of two integers may round either
way, one row in a thousand has one, and moves by up to 0.02; the median of a call's rows stays below ``LIMIT``."""

WHOLE = "the lowering as a whole"

Outputs = TypeVar("Outputs")


@dataclass(frozen=True, slots=True)
class Result(Generic[Outputs]):
    """A stage's graph, serialized, and what it computes of each input."""

    graph: bytes
    outputs: Outputs


def chosen_layers(kinds: Sequence[object], level: Level) -> list[int]:
    """All layers at ``full``; at ``quick`` the first, a middle and the last, and the first of every other kind."""
    if level == "full":
        return list(range(len(kinds)))
    chosen = {0, len(kinds) // 2, len(kinds) - 1}
    covered = {kinds[i] for i in chosen}
    return sorted(chosen | {kinds.index(kind) for kind in set(kinds) - covered})


def compare_stages(
    stages: Iterable[Stage],
    sessions: Sessions,
    *,
    layer: int,
    run: Callable[[Any], Outputs],
    difference: Callable[[str, Result[Outputs], Result[Outputs]], float],
) -> dict[str, float]:
    """The differences between each stage and the one before, by its name, and as ``all`` between first and last.

    Args:
        stages: Of the lowering.
        sessions: Open their graphs.
        layer: Its number, for messages.
        run: What a session's graph computes.
        difference: Of two results, by the name of what lies between them; raises where it is too large.

    Raises:
        VerificationError: ONNX Runtime does not run a graph.
        MissingExtraError: onnxruntime is not installed.
    """
    differences: dict[str, float] = {}
    results: list[Result[Outputs]] = []
    for stage in _in_float32(stages):
        graph = sessions.serialized(stage.graph)
        if results and graph == results[-1].graph:
            continue
        results.append(Result(graph, _ran(sessions, graph, run, layer=layer, name=stage.name)))
        if stage.record is not None:
            differences[stage.name] = difference(stage.name, *results[-2:])
    differences["all"] = difference(WHOLE, results[0], results[-1])
    return {name: float(f"{value:.3g}") for name, value in differences.items()}


def _in_float32(stages: Iterable[Stage]) -> Iterator[Stage]:
    """With MatMulNBits in float32: in the engine it rounds activations, in the standard graph nothing does."""
    for stage in stages:
        for node in stage.graph.graph:
            if node.op_type == "MatMulNBits":
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
        yield stage


def _ran(sessions: Sessions, graph: bytes, run: Callable[[Any], Outputs], *, layer: int, name: str) -> Outputs:
    try:
        return run(sessions.open(graph))
    except MissingExtraError:
        raise
    except Exception as error:  # ONNX Runtime's have no common base
        if is_out_of_memory(error):
            raise
        where = "the standard graph" if name == "standard" else f"the graph behind {name}"
        raise VerificationError(
            f"layer {layer}: ONNX Runtime does not run {where}: {error}", hint=hint_for(name)
        ) from error


def hint_for(name: str) -> str:
    """Who is at fault when what a stage computes is wrong."""
    blamed = "llmopt's exporter" if name == "standard" else "that graph pass"
    return f"this is a bug in {blamed}; verify: none builds all the same"


def limits(name: str, passes: Sequence[str], weights: Iterable[Weight]) -> tuple[float, float]:
    """What the median of a call's rows may differ by, and what a single row may.

    Args:
        name: The graph pass between the two graphs, or ``WHOLE``.
        passes: All of the lowering.
        weights: Of the layer's linears.
    """
    halves = name == HALF or (name == WHOLE and HALF in passes)
    schemes = [weight.scheme for weight in weights if isinstance(weight, QuantWeight)]
    rounds = any(scheme.input_activations is not None for scheme in schemes)
    if halves:
        return (3 * ROUNDED_LIMIT, 10 * ROUNDED_LIMIT) if rounds else (HALF_LIMIT, 10 * HALF_LIMIT)
    return LIMIT, ROUNDED_LIMIT if rounds else LIMIT


def first_rows(weight: Weight, count: int) -> Weight:
    """The first rows of a table: a lowering treats all alike, and they are most of a small model's bytes."""
    if isinstance(weight, DenseWeight):
        return DenseWeight.of(weight.rows(0, count).clone())
    return QuantWeight.of(weight.load().rows(slice(count)), weight.scheme)
