"""Store equal initializers once."""

import hashlib
from collections.abc import Hashable

import onnx_ir as ir

from llmopt.optimizer.contracts import GraphPass, PassContext

__all__ = ["ShareWeights"]

_LIMIT = 1 << 16
"""Bytes. Larger weights are read when the engine is written and not before: to compare them is to read the model."""


class ShareWeights(GraphPass):
    """Initializers with the same numbers become one; large ones only where they are in memory already.

    A table that embedding and head share is one initializer from the beginning: no comparison has to find it.
    """

    def run(self, graph: ir.Model, context: PassContext) -> ir.Model:
        """See ``GraphPass.run``."""
        initializers = graph.graph.initializers
        first: dict[Hashable, ir.Value] = {}
        applied = unread = 0
        for value in list(initializers.values()):
            key = _content(value)
            if key is None:
                unread += 1
            elif (kept := first.setdefault(key, value)) is not value and not value.is_graph_output():
                ir.convenience.replace_all_uses_with(value, kept)
                del initializers[str(value.name)]
                applied += 1
        context.detail("applied", applied)
        reason = f"{unread} initializers of more than {_LIMIT} bytes: to compare them is to read the model"
        context.detail("declined", [reason] if unread else [])
        return graph


def _content(value: ir.Value) -> Hashable:
    """Equal for initializers that may be one, None for one that is not compared."""
    tensor = value.const_value
    assert tensor is not None
    if tensor.nbytes > _LIMIT and not isinstance(tensor, ir.Tensor):
        return None
    shape = tuple(tensor.shape.numpy())
    return tensor.dtype, shape, hashlib.sha256(tensor.tobytes()).digest()
