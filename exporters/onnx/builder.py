"""Writes a graph node by node, with named values and constants made once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir import tape

__all__ = ["GraphBuilder"]


class GraphBuilder:
    """Collects the nodes and initializers of one graph or function."""

    def __init__(self) -> None:
        self._tape = tape.Tape()
        self._constants: dict[tuple[str, bytes], ir.Value] = {}

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """The nodes so far, in order."""
        return self._tape.nodes

    @property
    def initializers(self) -> Sequence[ir.Value]:
        """The initializers so far."""
        return self._tape.initializers

    def op(self, op_type: str, *inputs: ir.Value | None, name: str | None = None, **attributes: Any) -> ir.Value:
        """Append a node with one output called ``name``."""
        domain = attributes.pop("domain", "")
        value = self._tape.op(op_type, inputs, attributes, domain=domain, name=name)
        if name:
            value.name = name
        return value

    def op_multi(
        self, op_type: str, *inputs: ir.Value | None, names: Sequence[str], **attributes: Any
    ) -> list[ir.Value]:
        """Append a node with several outputs called ``names``."""
        domain = attributes.pop("domain", "")
        values = self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=len(names), domain=domain)
        for value, name in zip(values, names, strict=True):
            value.name = name
        return list(values)

    def constant(self, value: npt.ArrayLike, name: str) -> ir.Value:
        """An initializer; equal arrays of one type are made once, under the first one's name."""
        array = np.asarray(value)
        key = (f"{array.dtype}{array.shape}", array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._tape.initializer(ir.tensor(array, name=name), name=name)
        return self._constants[key]

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """An initializer around ``tensor``, under its own name."""
        return self._tape.initializer(tensor, name=tensor.name)
