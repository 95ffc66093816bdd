"""The standard graph: a model as ai.onnx operators, Q/DQ and composites, before any target's lowering."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from llmopt.exporters.onnx.builder import GraphBuilder
from llmopt.exporters.onnx.composites import (
    DOMAIN,
    OPSET,
    quantize_dequantize_per_token,
    select_rows,
    slot_attention,
)
from llmopt.exporters.onnx.rope import rope_tables
from llmopt.exporters.onnx.weights import linear_weight, table, vector
from llmopt.optimizer.model import Model, QuantWeight

__all__ = ["IR_VERSION", "standard_graph"]

IR_VERSION = 11


def standard_graph(model: Model, *, capacity: int) -> ir.Model:
    """The engine contract's graph (docs/architecture.md) of a Llama-shaped model.

    Args:
        model: Its weights are read only when the graph is saved.
        capacity: Positions the rope tables cover.
    """
    return _Decoder(model, capacity).build()


def _input(name: str, dtype: ir.DataType, *dims: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims))


class _Decoder:
    """Builds the graph of one decoder-only model; a method per part."""

    def __init__(self, model: Model, capacity: int) -> None:
        self.model = model
        self.config: Mapping[str, Any] = model.config
        self.capacity = capacity
        self.builder = GraphBuilder()
        self.rounded: dict[str, ir.Value] = {}
        self.ids = _input("input_ids", ir.DataType.INT64, "batch", "tokens")
        self.lengths = _input("past_lengths", ir.DataType.INT64, "batch")
        self.rows = _input("logit_rows", ir.DataType.INT64, "rows")
        self.past = [self._cache("past", i) for i in range(model.num_layers)]

    def build(self) -> ir.Model:
        config, builder, arch = self.config, self.builder, self.model.arch
        cos, sin = (
            builder.constant(array, name)
            for array, name in zip(rope_tables(config, self.capacity), ("rope.cos", "rope.sin"), strict=True)
        )
        embedding = f"{arch.embedding}.weight"
        self.table = table(builder, embedding, self.model.weights[embedding])
        hidden = builder.op("Gather", self.table, self.ids, axis=0, name=f"{arch.embedding}.output")
        presents: list[ir.Value] = []
        for i in range(self.model.num_layers):
            hidden, *present = self._layer(i, hidden, cos, sin)
            presents += present
        hidden = self._norm(arch.final_norm, hidden)
        logits = self._head(hidden)
        logits = builder.op("SelectRows", logits, self.rows, name="logits", domain=DOMAIN)
        logits.type, logits.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(("rows", config["vocab_size"]))
        inputs = [self.ids, self.lengths, self.rows, *(cache for pair in self.past for cache in pair)]
        graph = ir.Graph(
            inputs,
            [logits, *presents],
            nodes=builder.nodes,
            initializers=builder.initializers,
            opset_imports={"": OPSET, DOMAIN: 1},
            name=arch.name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="llmopt", functions=self._functions())

    def _functions(self) -> list[ir.Function]:
        config = self.config
        attention = slot_attention(
            num_heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
        )
        return [attention, select_rows(), *([quantize_dequantize_per_token()] if self.rounded else [])]

    def _cache(self, when: str, layer: int) -> tuple[ir.Value, ir.Value]:
        dims = ("batch", self.config["num_key_value_heads"], "capacity", self.config["head_dim"])
        key, value = (_input(f"{when}.{layer}.{kind}", ir.DataType.FLOAT, *dims) for kind in ("key", "value"))
        return key, value

    def _layer(self, i: int, hidden: ir.Value, cos: ir.Value, sin: ir.Value) -> list[ir.Value]:
        """Hidden states after layer ``i``, and its present key and value."""
        arch, builder = self.model.arch, self.builder
        prefix = arch.layer.format(i=i)
        normed = self._norm(f"{prefix}.{arch.norms[0]}", hidden)
        query, key, value = (self._linear(f"{prefix}.{name}", normed) for name in arch.attention[:3])
        attended, *present = builder.op_multi(
            "SlotAttention", query, key, value, *self.past[i], self.lengths, cos, sin,
            names=(f"{prefix}.attention.output", f"present.{i}.key", f"present.{i}.value"),
            domain=DOMAIN,
            num_heads=self.config["num_attention_heads"],
            kv_num_heads=self.config["num_key_value_heads"],
            scale=float(self.config["head_dim"]) ** -0.5,
        )  # fmt: skip
        for value_out, like in zip(present, self._cache("present", i), strict=True):
            value_out.type, value_out.shape = like.type, like.shape
        attended = self._linear(f"{prefix}.{arch.attention[3]}", attended)
        hidden = builder.op("Add", hidden, attended, name=f"{prefix}.attention.residual")
        normed = self._norm(f"{prefix}.{arch.norms[1]}", hidden)
        gate, up = (self._linear(f"{prefix}.{name}", normed) for name in arch.mlp[:2])
        silu = builder.op("Mul", gate, builder.op("Sigmoid", gate), name=f"{prefix}.mlp.silu")
        down = self._linear(f"{prefix}.{arch.mlp[2]}", builder.op("Mul", silu, up, name=f"{prefix}.mlp.product"))
        return [builder.op("Add", hidden, down, name=f"{prefix}.mlp.residual"), *present]

    def _norm(self, module: str, x: ir.Value) -> ir.Value:
        weight = vector(self.builder, f"{module}.weight", self.model.weights[f"{module}.weight"])
        epsilon = float(self.config["rms_norm_eps"])
        return self.builder.op("RMSNormalization", x, weight, axis=-1, epsilon=epsilon, name=f"{module}.output")

    def _linear(self, module: str, x: ir.Value) -> ir.Value:
        weight = self.model.weights[f"{module}.weight"]
        if isinstance(weight, QuantWeight) and weight.scheme.input_activations is not None:
            x = self._round_activations(x)
        y = self.builder.op("MatMul", x, linear_weight(self.builder, module, weight), name=f"{module}.output")
        bias = self.model.weights.get(f"{module}.bias")
        if bias is None:
            return y
        return self.builder.op("Add", y, vector(self.builder, f"{module}.bias", bias), name=f"{module}.biased")

    def _round_activations(self, x: ir.Value) -> ir.Value:
        """``x`` rounded per token, once for all linears that read it."""
        name = str(x.name)
        if name not in self.rounded:
            self.rounded[name] = self.builder.op("QuantizeDequantizePerToken", x, name=f"{name}.rounded", domain=DOMAIN)
        return self.rounded[name]

    def _head(self, hidden: ir.Value) -> ir.Value:
        head = self.model.arch.head
        if not self.model.is_tied:
            return self._linear(head, hidden)
        weight = self.model.weights[self.model.weight_of(head)]
        if isinstance(weight, QuantWeight) and weight.scheme.input_activations is not None:
            hidden = self._round_activations(hidden)
        transposed = self.builder.op("Transpose", self.table, perm=[1, 0], name=f"{head}.weight")
        return self.builder.op("MatMul", hidden, transposed, name=f"{head}.output")
