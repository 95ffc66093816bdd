"""Inputs of a graph through which whoever runs it gives an adapter: two factors of each linear that it changes.

ONNX Runtime's adapter files hold values for inputs by name. An input that is an initializer as well need not be given,
so a graph runs without an adapter: its factors have a rank of 0 then, and add nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

__all__ = ["BIAS", "DOWN", "UP", "GivenAdapters", "adapter_inputs", "is_adapter_input", "with_defaults"]

DOWN, UP, BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
"""Ends of their names, behind the linear's. They are PEFT's own, though each matrix is transposed here."""


@dataclass(frozen=True, slots=True)
class GivenAdapters:
    """An adapter that whoever runs the graph gives.

    Attributes:
        modules: Linears with inputs for its factors, and whether for a bias too.
    """

    modules: Mapping[str, bool]


def adapter_inputs(module: str, inputs: int, outputs: int, *, biased: bool) -> list[ir.Value]:
    """Float32 ``[inputs, rank]``, ``[rank, outputs]`` and, with ``biased``, ``[outputs]``; adapters decide the rank."""
    rank = f"{module}.rank"
    shapes: dict[str, tuple[int | str, ...]] = {DOWN: (inputs, rank), UP: (rank, outputs)}
    if biased:
        shapes[BIAS] = (outputs,)
    return [
        ir.Value(name=f"{module}.{end}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        for end, shape in shapes.items()
    ]


def is_adapter_input(name: str) -> bool:
    """Whether an input of a graph is one of these."""
    return name.endswith((DOWN, UP, BIAS))


def with_defaults(graph: ir.Graph) -> None:
    """Make these inputs optional, in place; behind the graph passes, which may share and fold what is constant."""
    for value in graph.inputs:
        if is_adapter_input(str(value.name)):
            assert value.shape is not None
            shape = [size if isinstance(size, int) else 0 for size in value.shape]
            value.const_value = ir.tensor(np.zeros(shape, np.float32), name=value.name)
            graph.register_initializer(value)
