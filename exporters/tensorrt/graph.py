"""The last touch to a lowered graph before TensorRT reads it: fixed sizes, and a name for every node."""

import re

import onnx_ir as ir

__all__ = ["fix_capacity", "name_nodes"]

_COUNTED = re.compile(r"val_\d|node_|$")
"""What builders and inlining call a value of which nobody said a name."""


def fix_capacity(graph: ir.Model, capacity: int) -> None:
    """Make ``capacity`` a number in all inputs and outputs: TensorRT updates caches of a fixed length only."""
    for value in [*graph.graph.inputs, *graph.graph.outputs]:
        if value.shape is not None:
            value.shape = ir.Shape([capacity if str(dim) == "capacity" else dim for dim in value.shape])


def name_nodes(graph: ir.Model) -> None:
    """Call each node after its result, or after the next named result that it contributes to, and its operator.

    TensorRT's messages and layers carry these names: they lead to the module of the model.
    """
    counts: dict[str, int] = {}
    purposes: dict[ir.Node, str] = {}
    for node in reversed(list(graph.graph)):
        named = [str(value.name) for value in node.outputs if not _COUNTED.match(str(value.name or ""))]
        readers = [use.node for value in node.outputs for use in value.uses()]
        purposes[node] = named[0] if named else next((purposes[each] for each in readers if each in purposes), "")
        name = purposes[node] if named else f"{purposes[node]}/{node.op_type}"
        counts[name] = counts.get(name, 0) + 1
        node.name = name if counts[name] == 1 else f"{name}.{counts[name]}"
