"""Sessions of one of our operators."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from llmopt.optimizer import kernels

_TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int8): TensorProto.INT8}
_TYPES |= {np.dtype(np.int32): TensorProto.INT32, np.dtype(np.uint8): TensorProto.UINT8}
_TYPES |= {np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16}
_TYPES |= {np.dtype(np.int64): TensorProto.INT64}


@pytest.fixture(scope="session")
def run_kernel() -> Callable[..., list[np.ndarray]]:
    """``run_kernel(name, inputs, dtypes, **attributes)``: the outputs of a session of that operator alone.

    ``inputs`` are arrays, or None for an optional one that is left out; ``dtypes`` are those of the outputs.
    """

    def run(
        name: str, inputs: Sequence[np.ndarray | None], dtypes: Sequence[Any], *, threads: int = 2, **attributes: Any
    ) -> list[np.ndarray]:
        given = {f"i{i}": array for i, array in enumerate(inputs) if array is not None}
        names = [f"i{i}" if array is not None else "" for i, array in enumerate(inputs)]
        outputs = [f"o{i}" for i in range(len(dtypes))]
        graph = helper.make_graph(
            [helper.make_node(name, names, outputs, domain=kernels.DOMAIN, **attributes)],
            "one",
            [helper.make_tensor_value_info(key, _TYPES[array.dtype], array.shape) for key, array in given.items()],
            [helper.make_tensor_value_info(o, _TYPES[np.dtype(d)], None) for o, d in zip(outputs, dtypes, strict=True)],
        )
        return _session(graph, threads).run(outputs, {key: _fed(array) for key, array in given.items()})

    return run


def _fed(array: np.ndarray) -> Any:
    """ONNX Runtime takes no bfloat16 of numpy's, but its bits."""
    if array.dtype != ml_dtypes.bfloat16:
        return array
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16)


def _session(graph: Any, threads: int) -> Any:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(kernels.DOMAIN, 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    kernels.register(options)
    data = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


@pytest.fixture
def feeds() -> Callable[..., Mapping[str, np.ndarray]]:
    """``feeds(past, tokens, ...)``: random inputs of an attention by name, behind ``past`` tokens of each sequence."""

    def make(
        past: Sequence[int],
        tokens: int,
        *,
        heads: int = 6,
        kv_heads: int = 2,
        columns: int = 16,
        capacity: int = 200,
        rotated: int = 16,
        int8: bool = False,
        seed: int = 0,
    ) -> Mapping[str, np.ndarray]:
        generator = np.random.default_rng(seed)
        batch = len(past)

        def normal(*shape: int) -> np.ndarray:
            return generator.standard_normal(shape, np.float32)

        cache = (batch, kv_heads, capacity, columns)
        found = {
            "query": normal(batch, tokens, heads * columns),
            "key": normal(batch, tokens, kv_heads * columns),
            "value": normal(batch, tokens, kv_heads * columns),
            "past_key": normal(*cache),
            "past_value": normal(*cache),
            "last": (np.array(past) + tokens - 1).astype(np.int32),
        }
        if int8:
            for kind in ("key", "value"):
                found[f"past_{kind}"] = np.clip(np.rint(found[f"past_{kind}"] * 40), -128, 127).astype(np.int8)
                found[f"{kind}_scale"] = generator.uniform(0.01, 0.04, kv_heads * columns).astype(np.float32)
        if rotated:
            angles = generator.uniform(0, 6, (capacity, rotated // 2)).astype(np.float32)
            found |= {"cosines": np.cos(angles), "sines": np.sin(angles)}
        return found

    return make
