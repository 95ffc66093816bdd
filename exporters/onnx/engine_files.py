"""An engine's graph on disk, and what its manifest says of it whatever it computes."""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.instructions import VNNI, host_instructions
from llmopt.optimizer.manifest import TensorInfo
from llmopt.optimizer.model import Model, QuantWeight
from llmopt.optimizer.scheme import Scheme

__all__ = ["check_capacity", "save_graph", "tensor_info", "vnni_feature"]

_DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
    ir.DataType.INT8: "int8",
}


def check_capacity(capacity: int | None, longest: int) -> None:
    """Raise ``UnsupportedError`` where a recipe's capacity is beyond the ``longest`` sequence that the model takes."""
    if capacity is not None and capacity > longest:
        raise UnsupportedError(
            f"capacity {capacity} is beyond the model's {longest} positions", hint="lower it or leave it out"
        )


def save_graph(graph: ir.Model, folder: Path, context: PassContext) -> None:
    """Write ``model.onnx`` and ``model.onnx.data`` into ``folder``, which is made; weights are read only now."""
    folder.mkdir(parents=True)
    ir.save(graph, folder / "model.onnx", external_data="model.onnx.data", callback=_progress(context))


def vnni_feature(model: Model) -> list[str]:
    """The feature ``vnni`` where the engine's kernels need that instruction set."""
    quantized = [weight for weight in model.weights.values() if isinstance(weight, QuantWeight)]
    if host_instructions() == VNNI and any(_is_lowered_for_vnni(weight.scheme) for weight in quantized):
        return [VNNI]
    return []


def _is_lowered_for_vnni(scheme: Scheme) -> bool:
    """Whether a linear's kernel is another one without: products of two integers, and blocks of few bits."""
    return scheme.weights.type == "int" and (scheme.input_activations is not None or scheme.weights.num_bits < 8)


def tensor_info(value: ir.Value) -> TensorInfo:
    """An input or output as the manifest describes it."""
    assert value.shape is not None
    assert value.dtype is not None
    dims = [size if isinstance(size, int) else str(size) for size in value.shape]
    return TensorInfo(name=str(value.name), dtype=_DTYPES[value.dtype], dims=dims)


def _progress(context: PassContext) -> Callable[[ir.TensorProtocol, ir.external_data.CallbackInfo], None]:
    def report(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        context.progress(info.index + 1, info.total)

    return report
