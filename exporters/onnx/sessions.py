"""Opens ONNX Runtime sessions of one graph at several stages, whose weights are written to disk once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir

from llmopt.optimizer import kernels
from llmopt.optimizer.errors import MissingExtraError

__all__ = ["Sessions"]

_DATA = "weights"
_INLINE = 1 << 10
"""Bytes. Smaller tensors are constants that ONNX's own checks look into: they stay in the graph."""
_PAGE = 1 << 12


class Sessions:
    """Serializes graphs and runs them, in a folder that holds the weights of all.

    Weights are mapped from one file, so that a session needs little memory of its own. A tensor that two graphs have in
    common is written once: it is recognized by its identity, which graph passes keep.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: dict[int, tuple[ir.TensorProtocol, ir.ExternalTensor]] = {}

    def serialized(self, graph: ir.Model) -> bytes:
        """``graph`` as it is now, with references to the folder's weights."""
        with self._external(graph):
            data: bytes = ir.to_proto(graph).SerializeToString(deterministic=True)
        return data

    def open(self, data: bytes) -> Any:
        """A session without ONNX Runtime's own optimizations, which would rewrite what is compared.

        Args:
            data: Made by ``serialized``; its inputs and outputs may have been changed since.

        Raises:
            MissingExtraError: onnxruntime is not installed.
        """
        try:
            import onnxruntime as ort
        except ModuleNotFoundError as error:
            raise MissingExtraError("onnxruntime", "cpu") from error
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        # A packed copy of every weight would double the layer's memory.
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        kernels.register(options)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    @contextmanager
    def _external(self, graph: ir.Model) -> Iterator[None]:
        """While it is open the graph's large initializers are references; behind it they are what they were."""
        values = [value for value in graph.graph.initializers.values() if _is_large(value)]
        tensors = [value.const_value for value in values]
        for value, tensor in zip(values, tensors, strict=True):
            assert tensor is not None
            value.const_value = self._reference(tensor)
        try:
            yield
        finally:
            for value, tensor in zip(values, tensors, strict=True):
                value.const_value = tensor

    def _reference(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        if id(tensor) not in self._written:
            # Holding the tensor keeps its id its own.
            self._written[id(tensor)] = tensor, self._write(tensor)
        return self._written[id(tensor)][1]

    def _write(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        with (self._folder / _DATA).open("ab") as file:
            file.seek(0, 2)
            file.write(bytes(-file.tell() % _PAGE))
            offset = file.tell()
            length = file.write(tensor.tobytes())
        return ir.ExternalTensor(
            _DATA, offset, length, ir.DataType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()), name=str(tensor.name), base_dir=str(self._folder),
        )  # fmt: skip


def _is_large(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.nbytes > _INLINE
