"""The standard graph: a model as ai.onnx operators, Q/DQ and composites, before any target's lowering."""

import numpy as np
import onnx_ir as ir

from llmopt.exporters.onnx import composites
from llmopt.exporters.onnx.adapter_inputs import GivenAdapters
from llmopt.exporters.onnx.builder import GraphBuilder
from llmopt.exporters.onnx.composites import DOMAIN, OPSET
from llmopt.exporters.onnx.linears import Linears, Lora
from llmopt.exporters.onnx.lora import LoraOptions, lora_slots
from llmopt.exporters.onnx.rope import rope_tables
from llmopt.exporters.onnx.weights import cache_scales, expert_weights, packed_order, table
from llmopt.optimizer.decoder import Activation, Attention, Decoder, Experts, Layer, Mlp, Norm, Rope
from llmopt.optimizer.model import Model, QuantWeight

__all__ = ["IR_VERSION", "standard_graph"]

IR_VERSION = 11


def standard_graph(
    model: Model,
    *,
    capacity: int,
    decoder: Decoder | None = None,
    lora: LoraOptions | GivenAdapters | None = None,
) -> ir.Model:
    """The engine contract's graph (docs/architecture.md) of a decoder-only model.

    Args:
        model: Its weights are read only when the graph is saved.
        capacity: Positions the rope tables cover.
        decoder: What to compute with these weights; by default what the model's own config says.
        lora: Which linears take adapters; none of them by default.
    """
    return _Graph(model, decoder or model.decoder, capacity, lora).build()


def _input(name: str, dtype: ir.DataType, *dims: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims))


class _Graph:
    """Builds the graph of one decoder-only model; a method per part."""

    def __init__(self, model: Model, decoder: Decoder, capacity: int, lora: LoraOptions | GivenAdapters | None) -> None:
        self.model = model
        self.decoder = decoder
        self.capacity = capacity
        self.builder = GraphBuilder()
        self.tables: list[tuple[Rope, ir.Value, ir.Value]] = []
        self.ids = _input("input_ids", ir.DataType.INT64, "batch", "tokens")
        self.lengths = _input("past_lengths", ir.DataType.INT64, "batch")
        self.rows = _input("logit_rows", ir.DataType.INT64, "rows")
        self.past = [self._cache("past", i) for i in range(len(decoder.layers))]
        self.adapters: list[ir.Value] = []
        self.parts = Linears(model, self.builder, self._lora(lora) if isinstance(lora, LoraOptions) else lora)

    def build(self) -> ir.Model:
        builder = self.builder
        hidden = self._embed()
        presents: list[ir.Value] = []
        for i, layer in enumerate(self.decoder.layers):
            hidden, *present = self._layer(i, layer, hidden)
            presents += present
        logits = self.parts.composite(composites.select_rows(), self._head(hidden), self.rows, name="logits")
        logits.type, logits.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(("rows", self.decoder.vocab_size))
        caches = (cache for pair in self.past for cache in pair)
        inputs = [self.ids, self.lengths, self.rows, *self.adapters, *caches, *self.parts.factors]
        graph = ir.Graph(
            inputs,
            [logits, *presents],
            nodes=builder.nodes,
            initializers=builder.initializers,
            opset_imports={"": OPSET, DOMAIN: 1},
            name=self.decoder.name,
        )
        functions = list(self.parts.functions.values())
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="llmopt", functions=functions)

    def _cache(self, when: str, i: int) -> tuple[ir.Value, ir.Value]:
        dims = ("batch", self.decoder.kv_heads, "capacity", self.decoder.head_dim)
        dtype = ir.DataType.FLOAT if self.model.cache_scales(0) is None else ir.DataType.INT8
        key, value = (_input(f"{when}.{i}.{kind}", dtype, *dims) for kind in ("key", "value"))
        return key, value

    def _lora(self, options: LoraOptions) -> Lora:
        """Three more inputs, and each token's adapter, which is its sequence's."""
        slots = lora_slots(self.model, self.decoder, options)
        adapters = _input("adapters", ir.DataType.INT64, "batch")
        dtype = ir.DataType.FLOAT if slots.dtype == "float32" else ir.DataType.BFLOAT16
        factors = _input("lora.factors", dtype, slots.slots, slots.size)
        ranks = _input("lora.ranks", ir.DataType.INT64, slots.slots, len(slots.modules))
        self.adapters = [adapters, factors, ranks]
        columns = self.builder.op("Unsqueeze", adapters, self.builder.constant(np.array([1, 2]), "axes.1.2"))
        ones = self.builder.constant(np.array([1]), "axis.1")
        shape = self.builder.op("Concat", self.builder.op("Shape", self.ids), ones, axis=0)
        tokens = self.builder.op("Expand", columns, shape, name="adapters.of_tokens")
        tokens.type, tokens.shape = adapters.type, ir.Shape(("batch", "tokens", 1))
        return Lora(slots, tokens, factors, ranks)

    def _embed(self) -> ir.Value:
        builder, decoder = self.builder, self.decoder
        name = f"{decoder.embedding}.weight"
        self.table = table(builder, name, self.model.weights[name])
        hidden = builder.op("Gather", self.table, self.ids, axis=0, name=f"{decoder.embedding}.output")
        hidden = self._times(hidden, decoder.embedding_scale, f"{decoder.embedding}.scaled")
        if decoder.project_in is not None:
            hidden = self.parts.linear(decoder.project_in, hidden)
        if decoder.positions is None:
            return hidden
        learned = f"{decoder.positions}.weight"
        position = self._positions()
        if decoder.positions_offset:
            position = builder.op("Add", position, builder.constant(np.int64(decoder.positions_offset), "first_row"))
        rows = table(builder, learned, self.model.weights[learned])
        embedded = builder.op("Gather", rows, position, axis=0, name=f"{decoder.positions}.output")
        return builder.op("Add", hidden, embedded, name=f"{decoder.positions}.added")

    def _positions(self) -> ir.Value:
        """Each token's position in its sequence, int64 ``[batch, tokens]``."""
        if "positions" not in self.parts.made:
            builder = self.builder
            zero, one = (builder.constant(np.int64(number), f"int.{number}") for number in (0, 1))
            tokens = builder.op("Squeeze", builder.op("Shape", self.ids, start=1, end=2))
            first = builder.op("Unsqueeze", self.lengths, builder.constant(np.array([1]), "axis.1"))
            positions = builder.op("Add", first, builder.op("Range", zero, tokens, one), name="positions")
            # ONNX's own inference does not see that a Range up to the number of tokens has as many elements.
            positions.type, positions.shape = self.ids.type, self.ids.shape
            self.parts.made["positions"] = positions
        return self.parts.made["positions"]

    def _layer(self, i: int, layer: Layer, hidden: ir.Value) -> list[ir.Value]:
        """Hidden states after the ``i``-th layer, and its present key and value."""
        name = layer.name
        attended, *present = self._attention(i, layer, self._norm(layer.attention_in, hidden))
        attended = self._norm(layer.attention_out, attended)
        attended = self._times(attended, layer.residual_scale, f"{name}.attention.scaled")
        behind = self.builder.op("Add", hidden, attended, name=f"{name}.attention.residual")
        behind = self._norm(layer.attention_after, behind)
        branch = self._norm(layer.mlp_in, hidden if layer.parallel else behind)
        if isinstance(layer.mlp, Experts):
            branch = self._experts(name, layer.mlp, branch)
        else:
            branch = self._mlp(name, layer.mlp, branch)
        branch = self._times(self._norm(layer.mlp_out, branch), layer.residual_scale, f"{name}.mlp.scaled")
        hidden = self.builder.op("Add", behind, branch, name=f"{name}.mlp.residual")
        return [self._norm(layer.mlp_after, hidden), *present]

    def _attention(self, i: int, layer: Layer, x: ir.Value) -> list[ir.Value]:
        """The output linear's result, and the present key and value."""
        attention = layer.attention
        query, key, value = self._projections(layer.name, attention, x)
        query = self._norm_heads(attention, attention.query_norm, attention.heads, query)
        key = self._norm_heads(attention, attention.key_norm, attention.kv_heads, key)
        query = self._rotated(attention, attention.heads, query, f"{layer.name}.attention.query")
        key = self._rotated(attention, attention.kv_heads, key, f"{layer.name}.attention.key")
        mask: list[ir.Value | None] = (
            [] if attention.window is None else [self._mask(attention.window, self.past[i][0])]
        )
        scales = cache_scales(self.builder, self.model, attention)
        if scales and not mask:
            mask = [None]
        self.parts.functions.setdefault("SlotAttention", composites.slot_attention(int8=bool(scales)))
        attended, *present = self.builder.op_multi(
            "SlotAttention", query, key, value, *self.past[i], self.lengths, *mask, *scales,
            names=(f"{layer.name}.attention.output", f"present.{i}.key", f"present.{i}.value"),
            domain=DOMAIN,
            num_heads=attention.heads,
            kv_num_heads=attention.kv_heads,
            scale=attention.scale,
            softcap=attention.softcap or 0.0,
            is_causal=int(attention.window is None),
        )  # fmt: skip
        for value_out, like in zip(present, self._cache("present", i), strict=True):
            value_out.type, value_out.shape = like.type, like.shape
        return [self.parts.linear(attention.output, attended), *present]

    def _projections(self, layer: str, attention: Attention, x: ir.Value) -> list[ir.Value]:
        """Query ``[batch, tokens, heads*head_dim]``, key and value ``[batch, tokens, kv_heads*head_dim]``."""
        if attention.packed is None:
            return [self.parts.linear(name, x) for name in attention.inputs]
        order = packed_order(attention) if attention.packing == "groups" else None
        packed = self.parts.linear(attention.packed, x, order=order)
        widths = [heads * attention.head_dim for heads in (attention.heads, attention.kv_heads, attention.kv_heads)]
        names = [f"{layer}.attention.packed.{part}" for part in ("query", "key", "value")]
        sizes = self.builder.constant(np.array(widths), "attention.widths")
        return self.builder.op_multi("Split", packed, sizes, axis=-1, names=names)

    def _norm_heads(self, attention: Attention, norm: Norm | None, heads: int, x: ir.Value) -> ir.Value:
        """The norm of query or key: of all heads of a token together, or of each head."""
        if norm is None or attention.norm_span == "all":
            return self._norm(norm, x)
        builder = self.builder
        split = builder.constant(np.array([0, 0, heads, attention.head_dim]), f"split.{heads}")
        normed = self._norm(norm, builder.op("Reshape", x, split))
        return builder.op("Reshape", normed, builder.constant(np.array([0, 0, -1]), "merge"))

    def _rotated(self, attention: Attention, heads: int, x: ir.Value, name: str) -> ir.Value:
        rope = attention.rope
        if rope is None:
            return x
        cos, sin = self._rope_tables(rope)
        dim = 0 if rope.dim == attention.head_dim else rope.dim
        return self.builder.op(
            "RotaryEmbedding", x, cos, sin, self._positions(), num_heads=heads, rotary_embedding_dim=dim, name=name
        )

    def _rope_tables(self, rope: Rope) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines ``[capacity, dim/2]``, once for all layers with this rope."""
        for known, cos, sin in self.tables:
            if known == rope:
                return cos, sin
        arrays = rope_tables(rope, self.capacity)
        prefix = f"rope.{len(self.tables)}" if self.tables else "rope"
        cos, sin = (self.builder.constant(a, f"{prefix}.{n}") for a, n in zip(arrays, ("cos", "sin"), strict=True))
        self.tables.append((rope, cos, sin))
        return cos, sin

    def _mask(self, window: int, past_key: ir.Value) -> ir.Value:
        """Which cached tokens each token sees, bool ``[batch, 1, tokens, capacity]``, once for all layers."""
        name = f"window.{window}"
        if name not in self.parts.made:
            mask = composites.sliding_window_mask()
            self.parts.made[name] = self.parts.composite(mask, self._positions(), past_key, name=name, window=window)
        return self.parts.made[name]

    def _mlp(self, layer: str, mlp: Mlp, x: ir.Value) -> ir.Value:
        gate: ir.Value | None
        if mlp.packed is not None:
            names = [f"{layer}.mlp.packed.{part}" for part in ("gate", "up")]
            packed = self.parts.linear(mlp.packed, x)
            gate, up = self.builder.op_multi("Split", packed, axis=-1, num_outputs=2, names=names)
        else:
            assert mlp.up is not None
            gate = None if mlp.gate is None else self.parts.linear(mlp.gate, x)
            up = self.parts.linear(mlp.up, x)
        if gate is None:
            inner = self._activated(mlp.activation, up, f"{layer}.mlp.activated")
        else:
            activated = self._activated(mlp.activation, gate, f"{layer}.mlp.activated")
            inner = self.builder.op("Mul", activated, up, name=f"{layer}.mlp.product")
        return self.parts.linear(mlp.down, inner)

    def _activated(self, activation: Activation, x: ir.Value, name: str) -> ir.Value:
        return composites.activated(self.builder, activation, x, name=name)

    def _experts(self, layer: str, experts: Experts, x: ir.Value) -> ir.Value:
        scores = self.parts.linear(experts.router, x)
        weights = [tuple(self.model.weights[f"{name}.weight"] for name in expert) for expert in experts.experts]
        gate_up, down = expert_weights(self.builder, f"{layer}.mlp.experts", weights)
        return self.parts.composite(
            composites.experts(experts.activation), x, scores, gate_up, down,
            name=f"{layer}.mlp.experts.output",
            top_k=experts.top_k, normalize=int(experts.normalize), activation=experts.activation,
        )  # fmt: skip

    def _norm(self, norm: Norm | None, x: ir.Value) -> ir.Value:
        """``x`` normalized, once for all that read it; ``x`` itself without a norm."""
        if norm is None:
            return x
        made = f"{norm.name}({x.name})"
        if made in self.parts.made:
            return self.parts.made[made]
        output = f"{norm.name}.output"
        name = output if output not in self.parts.made else f"{output}({x.name})"
        kind = "RMSNormalization" if norm.kind == "rms" else "LayerNormalization"
        inputs = [self.parts.vector(f"{norm.name}.weight", offset=norm.offset)]
        if norm.kind == "layer":
            inputs.append(self.parts.vector(f"{norm.name}.bias"))
        y = self.builder.op(kind, x, *inputs, axis=-1, epsilon=norm.epsilon, name=name)
        self.parts.made[made] = self.parts.made[output] = y
        return y

    def _head(self, hidden: ir.Value) -> ir.Value:
        builder, decoder = self.builder, self.decoder
        hidden = self._norm(decoder.final_norm, hidden)
        if decoder.project_out is not None:
            hidden = self.parts.linear(decoder.project_out, hidden)
        logits = self._times(self._head_product(hidden), decoder.logit_scale, "logits.scaled")
        if decoder.logit_softcap is None:
            return logits
        limit = builder.constant(np.float32(decoder.logit_softcap), "logits.softcap")
        return builder.op("Mul", builder.op("Tanh", builder.op("Div", logits, limit)), limit, name="logits.capped")

    def _head_product(self, hidden: ir.Value) -> ir.Value:
        head = self.decoder.head
        if not self.model.is_tied:
            return self.parts.linear(head, hidden)
        weight = self.model.weights[self.model.weight_of(head)]
        if isinstance(weight, QuantWeight) and weight.scheme.input_activations is not None:
            hidden = self.parts.rounded(hidden, weight)
        transposed = self.builder.op("Transpose", self.table, perm=[1, 0], name=f"{head}.weight")
        return self.builder.op("MatMul", hidden, transposed, name=f"{head}.output")

    def _times(self, x: ir.Value, factor: float, name: str) -> ir.Value:
        if factor == 1.0:
            return x
        return self.builder.op("Mul", x, self.builder.constant(np.float32(factor), f"{name}.by"), name=name)
