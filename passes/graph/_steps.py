"""Runs onnx_ir's own passes as parts of a graph pass, and counts what they take away."""

import onnx_ir as ir

__all__ = ["run_steps"]


def run_steps(graph: ir.Model, *steps: ir.passes.PassBase) -> int:
    """Apply ``steps`` one after the other, in place.

    Returns:
        How many nodes, initializers, functions and imported operator sets are gone.
    """
    before = _parts(graph)
    for step in steps:
        step(graph)
    return len(before - _parts(graph))


def _parts(graph: ir.Model) -> set[object]:
    main = graph.graph
    return {*main, *main.initializers.values(), *graph.functions.values(), *main.opset_imports}
