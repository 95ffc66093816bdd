"""What a linear costs in a scheme: in a checkpoint, and in an engine for ONNX Runtime's CPU provider."""

import math

from llmopt.optimizer.model import Model
from llmopt.optimizer.scheme import Scheme
from llmopt.passes.graph._nbits import packed_as

__all__ = ["checkpoint_bits", "engine_bytes", "other_engine_bytes"]

_FLOAT_BITS = 16
_FLOAT_BYTES = 4


def checkpoint_bits(shape: tuple[int, int], scheme: Scheme | None) -> int:
    """Bits of a weight ``[out, in]`` as checkpoints store it: values, scales as 16-bit floats, zero points.

    A linear that stays in float, with no scheme, has 16 bits a weight.
    """
    rows, columns = shape
    if scheme is None:
        return rows * columns * _FLOAT_BITS
    spec = scheme.weights
    scales = math.prod(spec.scale_shape(rows, columns))
    zeros = 0 if spec.symmetric else scales * spec.num_bits
    return rows * columns * spec.num_bits + scales * _FLOAT_BITS + zeros


def engine_bytes(shape: tuple[int, int], scheme: Scheme | None) -> int:
    """Bytes of the same weight in an engine, whose floats are float32.

    Weight-only kernels take blocks of some columns at most (``_nbits.packed_as``): scales of larger groups are
    repeated.
    """
    rows, columns = shape
    if scheme is None:
        return rows * columns * _FLOAT_BYTES
    spec = scheme.weights
    if scheme.input_activations is not None or spec.type != "int":
        scales = math.prod(spec.scale_shape(rows, columns))
        return rows * columns * spec.num_bits // 8 + scales * _FLOAT_BYTES
    bits, block = packed_as(spec.num_bits, spec.group_size or columns)
    block = block or 16
    blocks = -(-columns // block)
    zeros = 0 if spec.symmetric else rows * -(-blocks * bits // 8)
    return rows * blocks * (block * bits // 8 + _FLOAT_BYTES) + zeros


def other_engine_bytes(model: Model, head: Scheme | None) -> int:
    """Bytes of what is no linear of the decoder's layers: the tables, norms and biases, with ``head`` for the head.

    A tied table is one, but for a head that quantizes activations: its kernel takes the transpose.
    """
    names = {model.weight_of(module) for module in model.linears()}
    total = sum(math.prod(weight.shape) * _FLOAT_BYTES for name, weight in model.weights.items() if name not in names)
    rows, columns = model.weights[model.weight_of(model.arch.head)].shape
    is_twice = model.is_tied and head is not None and head.input_activations is not None
    return total + engine_bytes((rows, columns), head) + (rows * columns if is_twice else 0)
