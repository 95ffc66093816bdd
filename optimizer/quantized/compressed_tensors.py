"""compressed-tensors' checkpoints (llm-compressor): integers in streams of bits, int8 and FP8, as groups of modules.

Layouts: the project's own compressors of pack-quantized, int-quantized, naive-quantized and float-quantized.
``exporters/checkpoint/compressed_tensors.py`` writes what this reads.
"""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from llmopt.optimizer.bit_stream import signed, unpacked
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.model import QuantTensors, QuantWeight
from llmopt.optimizer.quantized.gptq import group_index
from llmopt.optimizer.quantized.stored import FLOATS, Stored
from llmopt.optimizer.scheme import QuantSpec, Scheme

__all__ = ["MARKS", "PARAMETERS", "read"]

MARKS = ("weight_packed", "weight_scale")

PARAMETERS = frozenset(
    {
        "weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale",
        "input_zero_point",
    }
)  # fmt: skip

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")

_NUMBERS = {"int": "I8", "float": "F8_E4M3"}


def read(module: str, stored: Stored, quantization: Mapping[str, Any]) -> QuantWeight:
    """One linear, its integers unpacked when they are asked for.

    Raises:
        InputError: A tensor is missing or does not fit the config, which may contradict itself.
        UnsupportedError: The config asks for a scheme, a format or a transform that nothing here computes.
    """
    for name in ("sparsity_config", "transform_config"):
        if quantization.get(name):
            raise UnsupportedError(
                f"{stored.where}: {name} of compressed-tensors is not supported",
                hint="take a checkpoint without sparsity and transforms",
            )
    scheme = _scheme(module, stored, quantization)
    rows, columns = _shape(module, stored)
    spec, scales = scheme.weights, scheme.weights.scale_shape(rows, columns)
    if spec.group_size is not None and columns % spec.group_size:
        raise InputError(
            f"{stored.where}: {module} has {columns} columns, which group_size {spec.group_size} does not divide",
            hint="config.json belongs to another checkpoint",
        )
    if spec.strategy == "tensor":
        scale = stored.one(f"{module}.weight_scale")
    else:
        scale = stored.take(f"{module}.weight_scale", FLOATS, scales)
    packed = f"{module}.weight_packed" in stored.tensors
    zero = input_scale = index = None
    if packed:
        numbers = stored.take(f"{module}.weight_packed", ("I32",), (rows, -(-columns * spec.num_bits // 32)))
    else:
        numbers = stored.take(f"{module}.weight", (_NUMBERS[spec.type],), (rows, columns))
    if not spec.symmetric:
        kind, height = ("I32", -(-rows * spec.num_bits // 32)) if packed else ("I8", rows)
        zero = stored.take(f"{module}.weight_zero_point", (kind,), (height, scales[1]))
    if scheme.needs_input_scale:
        input_scale = stored.one(f"{module}.input_scale")
    if f"{module}.weight_g_idx" in stored.tensors:
        index = group_index(stored.take(f"{module}.weight_g_idx", ("I32",), (columns,)), scales[1], stored, module)

    def load() -> QuantTensors:
        values, points = numbers(), None if zero is None else zero()
        if packed:
            values = signed(unpacked(values, spec.num_bits, columns), spec.num_bits)
            if points is not None:
                points = signed(unpacked(points.T, spec.num_bits, rows), spec.num_bits).T.contiguous()
        entering = None if input_scale is None else input_scale().float().reshape(1)
        block = spec.block_structure
        return QuantTensors(values, scale().float().reshape(scales), points, entering, block, index)

    return QuantWeight((rows, columns), scheme, load, index is not None)


def _shape(module: str, stored: Stored) -> tuple[int, int]:
    if f"{module}.weight_packed" not in stored.tensors:
        rows, columns = stored.take(f"{module}.weight", tuple(_NUMBERS.values()), (None, None)).shape
        return rows, columns
    shape = stored.take(f"{module}.weight_shape", ("I64", "I32"), (2,))().tolist()
    return int(shape[0]), int(shape[1])


def _scheme(module: str, stored: Stored, quantization: Mapping[str, Any]) -> Scheme:
    """What the config's groups say about ``module``."""
    if (entry := _match(quantization.get("ignore") or (), module)) is not None:
        raise InputError(
            f"{stored.where}: {module} is stored quantized, but quantization_config.ignore has {entry!r}",
            hint="config.json belongs to another checkpoint",
        )
    groups = quantization.get("config_groups") or {}
    targets = {entry: group for group in groups.values() for entry in group.get("targets") or ()}
    entry = _match(targets, module)
    if entry is None:
        raise InputError(
            f"{stored.where}: {module} is stored quantized, but no group of quantization_config speaks of it",
            hint="config.json belongs to another checkpoint",
        )
    group = targets[entry]
    form = group.get("format") or quantization.get("format")
    if form not in _FORMATS:
        raise UnsupportedError(
            f"{stored.where}: format {form!r} of compressed-tensors is not supported",
            hint=f"supported: {', '.join(_FORMATS)}",
        )
    if group.get("output_activations"):
        raise UnsupportedError(f"{stored.where}: output_activations of {module} are quantized, which is not supported")
    inputs = group.get("input_activations")
    what = f"{stored.where}: weights of {module} in quantization_config"
    return Scheme(
        weights=_spec(group.get("weights") or {}, what),
        input_activations=None if inputs is None else _spec(inputs, what.replace("weights", "input_activations", 1)),
    )


def _match(entries: Any, module: str) -> str | None:
    """The entry that decides about ``module``: its name, else an expression, else its class; None where none does."""
    if module in entries:
        return module
    expressions = [each for each in entries if each.startswith("re:") and re.match(each[3:], module)]
    return expressions[0] if expressions else "Linear" if "Linear" in entries else None


def _spec(arguments: Mapping[str, Any], what: str) -> QuantSpec:
    """compressed-tensors' words, which are ours and a few more; it derives a missing strategy from the group size."""
    given = {name: value for name, value in arguments.items() if name in QuantSpec.model_fields and value is not None}
    size = given.get("group_size")
    if "strategy" not in given:
        given["strategy"] = "tensor" if size is None else "channel" if size == -1 else "group"
    if given["strategy"] != "group":
        given.pop("group_size", None)
    try:
        return QuantSpec.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UnsupportedError(
            f"{what}: {place + ': ' if place else ''}{first['msg']}",
            hint="supported: integers of 2, 3, 4 and 8 bits, and FP8 E4M3",
        ) from error
