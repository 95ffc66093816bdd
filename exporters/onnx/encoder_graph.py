"""The standard graph of an encoder: the skeleton that torch exported, with a model's weights in it."""

import onnx_ir as ir

from llmopt.exporters.onnx.builder import GraphBuilder
from llmopt.exporters.onnx.composites import DOMAIN, OPSET
from llmopt.exporters.onnx.encoder_skeleton import LINEAR, NORM, TABLE, encoder_skeleton
from llmopt.exporters.onnx.linears import Linears
from llmopt.exporters.onnx.standard import IR_VERSION
from llmopt.exporters.onnx.weights import table
from llmopt.optimizer.model import Model

__all__ = ["encoder_graph"]


def encoder_graph(model: Model, skeleton: ir.Model | None = None) -> ir.Model:
    """ai.onnx operators, Q/DQ and composites that compute an encoder's vectors.

    ``input_ids``, ``attention_mask`` and, where tokens have types, ``token_type_ids``, int64 ``[batch, tokens]`` ->
    ``last_hidden_state`` float32 ``[batch, tokens, hidden]`` and ``sentence_embedding`` float32 ``[batch, hidden]``.

    Args:
        model: Its weights are read only when the graph is saved.
        skeleton: What ``encoder_skeleton`` made, changed in place; None: that of all layers.
    """
    graph = (skeleton or encoder_skeleton(model)).graph
    builder = GraphBuilder()
    binder = _Binder(model, builder)
    for node in list(graph):
        if node.domain != DOMAIN:
            continue
        first = len(builder.nodes)
        (old,) = node.outputs
        new = binder.bind(node)
        graph.insert_before(node, builder.nodes[first:])
        new.type, new.shape = old.type, old.shape
        if old.is_graph_output():
            new.name = old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    for value in builder.initializers:
        graph.register_initializer(value)
    graph.opset_imports.clear()
    graph.opset_imports.update({"": OPSET, DOMAIN: 1})
    graph.name = model.family.name
    return ir.Model(
        graph, ir_version=IR_VERSION, producer_name="llmopt", functions=list(binder.linears.functions.values())
    )


class _Binder:
    """Makes the operators that stand for a part of the skeleton."""

    def __init__(self, model: Model, builder: GraphBuilder) -> None:
        self.linears = Linears(model, builder)
        self._model = model
        self._builder = builder

    def bind(self, node: ir.Node) -> ir.Value:
        module = node.attributes["module"].as_string()
        (x,) = node.inputs
        assert x is not None
        if node.op_type == LINEAR:
            return self.linears.linear(module, x)
        if node.op_type == TABLE:
            weight = f"{module}.weight"
            rows = table(self._builder, weight, self._model.weights[weight])
            return self._builder.op("Gather", rows, x, axis=0, name=f"{module}.output")
        assert node.op_type == NORM
        names = [f"{module}.weight", *([bias] if (bias := f"{module}.bias") in self._model.weights else [])]
        vectors = [self.linears.vector(name) for name in names]
        epsilon = node.attributes["epsilon"].as_float()
        return self._builder.op("LayerNormalization", x, *vectors, axis=-1, epsilon=epsilon, name=f"{module}.output")
