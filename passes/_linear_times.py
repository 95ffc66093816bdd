"""How long this machine takes for one row times a linear's weight, in ONNX Runtime's kernels for each scheme."""

import time
from statistics import median
from typing import Any

import numpy as np

from llmopt.optimizer.errors import MissingExtraError, PassError
from llmopt.optimizer.instructions import VNNI, host_instructions
from llmopt.optimizer.scheme import Scheme
from llmopt.passes.graph._nbits import packed_as

__all__ = ["linear_milliseconds", "refuse_untimed"]

_ROUNDS = 30
_SECONDS = 0.25
"""Of the timed rounds of one linear; at least five of them run."""
_CACHE_BYTES = 64 << 20
"""Copies of the weight are multiplied in turn until they exceed this, as a model's layers leave no cache warm."""


def linear_milliseconds(shape: tuple[int, int], scheme: Scheme | None, *, threads: int | None = None) -> float:
    """The median time for one token through a linear ``[out, in]``, in milliseconds.

    Timed in a session of random weights with the operator that the CPU target's lowering makes: ``MatMulNBits``,
    ``MatMulIntegerToFloat`` (on rows that are rounded already, since linears share that), or ``MatMul``.

    Args:
        shape: Of the weight.
        scheme: One that ``refuse_untimed`` lets pass; None for float32.
        threads: Of the session; None for ONNX Runtime's own number.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnxruntime", "cpu") from error
    copies = min(64, max(2, _CACHE_BYTES // max(1, _bytes(shape, scheme))))
    model, row = _graph(shape, scheme, copies)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": row})
    seconds: list[float] = []
    while len(seconds) < 5 or (len(seconds) < _ROUNDS and sum(seconds) < _SECONDS):
        started = time.perf_counter()
        session.run(None, {"x": row})
        seconds.append(time.perf_counter() - started)
    return 1000 * median(seconds) / copies


def refuse_untimed(scheme: Scheme | None) -> None:
    """Refuse a scheme that the CPU's engine only checks, in float32.

    Raises:
        PassError: There is no kernel for it.
    """
    if scheme is not None and scheme.weights.type != "int":
        raise PassError(
            f"{scheme.name} has no kernel on a CPU whose time could be measured",
            hint="give a budget of bits or bytes",
        )


def _bytes(shape: tuple[int, int], scheme: Scheme | None) -> int:
    bits = 32 if scheme is None else scheme.weights.num_bits
    return shape[0] * shape[1] * bits // 8


def _graph(shape: tuple[int, int], scheme: Scheme | None, copies: int) -> tuple[bytes, np.ndarray]:
    """A serialized graph with ``copies`` products of one row, each with weights of its own, and the row."""
    from onnx import TensorProto, helper

    random = np.random.default_rng(0)
    nodes, initializers, outputs = [], [], []
    is_rounded = scheme is not None and scheme.input_activations is not None
    for number in range(copies):
        node, tensors = _product(shape, scheme, f"w{number}", f"y{number}", random)
        nodes.append(node)
        initializers += tensors
        outputs.append(helper.make_tensor_value_info(f"y{number}", TensorProto.FLOAT, [1, shape[0]]))
    kind = TensorProto.UINT8 if is_rounded else TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", kind, [1, shape[1]])]
    graph = helper.make_graph(nodes, "linear", inputs, outputs, initializers)
    imports = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=11)
    row = random.standard_normal((1, shape[1])).astype(np.float32)
    return model.SerializeToString(), (row * 40 + 128).astype(np.uint8) if is_rounded else row


def _product(
    shape: tuple[int, int], scheme: Scheme | None, name: str, output: str, random: np.random.Generator
) -> tuple[Any, list[Any]]:
    """One product and its tensors."""
    from onnx import helper, numpy_helper

    rows, columns = shape

    def tensor(suffix: str, values: np.ndarray) -> Any:
        return numpy_helper.from_array(values, f"{name}.{suffix}")

    def integers(*size: int) -> np.ndarray:
        return random.integers(0, 256, size, np.uint8)

    if scheme is None:
        weight = tensor("values", random.standard_normal((columns, rows)).astype(np.float32))
        return helper.make_node("MatMul", ["x", weight.name], [output]), [weight]
    spec = scheme.weights
    if scheme.input_activations is not None:
        tensors = [
            tensor("values", integers(columns, rows).view(np.int8)),
            tensor("step", np.asarray(1 / 127, np.float32)),
            tensor("scale", np.full(rows, 0.01, np.float32)),
            tensor("middle", np.asarray(128, np.uint8)),
        ]
        values, step, scale, middle = (each.name for each in tensors)
        inputs = ["x", values, step, scale, middle]
        if host_instructions() != VNNI:  # see lower_linear
            tensors[0] = tensor("values", integers(columns, rows))
            inputs.append(middle)
        return helper.make_node("MatMulIntegerToFloat", inputs, [output], domain="com.microsoft"), tensors
    bits, block = packed_as(spec.num_bits, spec.group_size or columns)
    block = block or 16
    blocks = -(-columns // block)
    tensors = [
        tensor("values", integers(rows, blocks, block * bits // 8)),
        tensor("scales", np.full((rows, blocks), 0.01, np.float32)),
    ]
    if not spec.symmetric:
        tensors.append(tensor("zero_points", integers(rows, -(-blocks * bits // 8))))
    node = helper.make_node(
        "MatMulNBits", ["x", *(each.name for each in tensors)], [output], domain="com.microsoft",
        K=columns, N=rows, bits=bits, block_size=block, accuracy_level=4,
    )  # fmt: skip
    return node, tensors
