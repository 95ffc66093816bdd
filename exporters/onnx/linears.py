"""Linears, composites and vectors of a standard graph, each made once for all that read it."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmopt.exporters.onnx import composites
from llmopt.exporters.onnx.adapter_inputs import GivenAdapters, adapter_inputs
from llmopt.exporters.onnx.builder import GraphBuilder
from llmopt.exporters.onnx.composites import DOMAIN
from llmopt.exporters.onnx.weights import input_scale, linear_weight, reordered, table, vector
from llmopt.optimizer.manifest import LoraSlots
from llmopt.optimizer.model import Model, QuantWeight

__all__ = ["Linears", "Lora"]


@dataclass(frozen=True, slots=True)
class Lora:
    """What linears with adapters read in a graph.

    Attributes:
        slots: Which linears they are, and where factors lie.
        adapters: int64 ``[batch, tokens, 1]``, each token's.
        factors, ranks: Of all adapters; see ``composites.lora_add``.
    """

    slots: LoraSlots
    adapters: ir.Value
    factors: ir.Value
    ranks: ir.Value

    @property
    def numbers(self) -> dict[str, int]:
        """The linears' numbers by name."""
        return {module.name: number for number, module in enumerate(self.slots.modules)}


class Linears:
    """Writes the parts of one graph that have weights and are the same in every kind of model.

    Attributes:
        builder: Of the graph.
        functions: The composites' functions that the nodes so far need, by name.
        made: Values that may be asked for again, by what makes them.
        factors: Inputs of the graph that adapters give; see ``adapter_inputs.py``.
    """

    def __init__(self, model: Model, builder: GraphBuilder, lora: Lora | GivenAdapters | None = None) -> None:
        self.builder = builder
        self.functions: dict[str, ir.Function] = {}
        self.made: dict[str, ir.Value] = {}
        self.factors: list[ir.Value] = []
        self._model = model
        self._lora = lora

    def linear(self, module: str, x: ir.Value, *, order: np.ndarray | None = None) -> ir.Value:
        """``x`` times the module's weight, plus its bias; with ``order`` the outputs are in that order of rows."""
        weight = self._model.weights[f"{module}.weight"]
        bias = self._model.weights.get(f"{module}.bias")
        if order is not None:
            weight, bias = reordered(weight, order), None if bias is None else reordered(bias, order)
        x = read = self._rotated_input(module, x)
        if isinstance(weight, QuantWeight) and weight.has_group_index:
            x = self._by_group(module, x, weight)
        if isinstance(weight, QuantWeight) and weight.scheme.input_activations is not None:
            x = self.rounded(x, weight)
        y = self.builder.op("MatMul", x, linear_weight(self.builder, module, weight), name=f"{module}.output")
        if bias is not None:
            y = self.builder.op("Add", y, vector(self.builder, f"{module}.bias", bias), name=f"{module}.biased")
        return self._adapted(module, y, read)

    def rounded(self, x: ir.Value, weight: QuantWeight) -> ir.Value:
        """``x`` rounded as the weight's scheme says, once for all linears that read it rounded so."""
        spec = weight.scheme.input_activations
        assert spec is not None
        inputs, attributes = [x], {}
        if not spec.dynamic:
            function = composites.quantize_dequantize_static(spec.type)
            inputs.append(input_scale(self.builder, str(x.name), weight))
        elif spec.group_size is not None:
            function = composites.quantize_dequantize_fp8_per_group()
            attributes = {"size": spec.group_size}
        elif spec.type == "float":
            function = composites.quantize_dequantize_fp8_per_token()
        else:
            function = composites.quantize_dequantize_per_token()
        made = f"{function.name}({', '.join(str(value.name) for value in inputs)}, {attributes})"
        if made not in self.made:
            name = f"{x.name}.rounded"
            name = name if name not in self.made else f"{name}({function.name})"
            self.made[made] = self.made[name] = self.composite(function, *inputs, name=name, **attributes)
        return self.made[made]

    def vector(self, name: str, *, offset: float = 0.0) -> ir.Value:
        """A norm's weight or bias, once for all that read it."""
        if name not in self.made:
            self.made[name] = vector(self.builder, name, self._model.weights[name], offset=offset)
        return self.made[name]

    def composite(self, function: ir.Function, *inputs: ir.Value, name: str, **attributes: int | str) -> ir.Value:
        """A node of a composite, whose function becomes part of the model."""
        self.functions.setdefault(function.name, function)
        return self.builder.op(function.name, *inputs, name=name, domain=DOMAIN, **attributes)

    def _adapted(self, module: str, y: ir.Value, x: ir.Value) -> ir.Value:
        """``y`` with the changes of each row's adapter, where the module takes any."""
        lora = self._lora
        if isinstance(lora, GivenAdapters):
            return self._given(module, y, x, lora) if module in lora.modules else y
        numbers = {} if lora is None else lora.numbers
        if lora is None or module not in numbers:
            return y
        entry = lora.slots.modules[numbers[module]]
        part = [[numbers[module], entry.down, entry.up, 0, entry.outputs, int(entry.biased)]]
        added = self.composite(
            composites.lora_add(biased=entry.biased), y, x, lora.adapters, lora.factors, lora.ranks,
            self.builder.constant(np.array(part), f"{module}.lora"),
            name=f"{module}.adapted", max_rank=lora.slots.max_rank,
        )  # fmt: skip
        added.type, added.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(("batch", "tokens", entry.outputs))
        return added

    def _given(self, module: str, y: ir.Value, x: ir.Value, given: GivenAdapters) -> ir.Value:
        """The same with factors that are inputs of the graph."""
        outputs, inputs = self._model.weights[f"{module}.weight"].shape
        factors = adapter_inputs(module, inputs, outputs, biased=given.modules[module])
        self.factors += factors
        down, up, *bias = factors
        added = self.builder.op("MatMul", self.builder.op("MatMul", x, down), up, name=f"{module}.lora")
        y = self.builder.op("Add", y, added, name=f"{module}.adapted")
        return self.builder.op("Add", y, *bias, name=f"{module}.adapted.biased") if bias else y

    def _rotated_input(self, module: str, x: ir.Value) -> ir.Value:
        """``x`` times the module's online rotation, where it has one."""
        rotation = self._model.input_rotation(module)
        if rotation is None:
            return x
        matrix = table(self.builder, f"{module}.input_rotation", rotation)
        return self.composite(composites.rotate_blocks(), x, matrix, name=f"{x.name}.turned")

    def _by_group(self, module: str, x: ir.Value, weight: QuantWeight) -> ir.Value:
        """The columns of ``x`` in the order of the weight's groups, once for all linears that read them so."""
        _, order = weight.load().by_group()
        assert order is not None
        index = self.builder.constant(order.numpy(), f"{module}.order")
        made = f"{x.name}.by_group({index.name})"
        if made not in self.made:
            self.made[made] = self.builder.op("Gather", x, index, axis=-1, name=made)
        return self.made[made]
