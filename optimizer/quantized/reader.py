"""From a quantized checkpoint's tensors to weights: which format it has, and everything in it accounted for."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.optimizer.checkpoint import as_floats, some
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.hf_config import read_json
from llmopt.optimizer.model import Weight
from llmopt.optimizer.quantized import awq, bitsandbytes, compressed_tensors, fp8, gptq
from llmopt.optimizer.quantized.stored import Stored
from llmopt.optimizer.tensor_file import FileTensor

__all__ = ["SIDE_FILES", "Quantization", "Reading", "quantization_of", "read_quantized"]

SIDE_FILES: Mapping[str, str] = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
"""Where older programs, and ModelOpt, say how a checkpoint is quantized -> their ``quant_method``."""

_CACHE_SCALES = re.compile(r"\.(q|k|v|kv|prob|k_proj\.output|v_proj\.output|k_proj\.k|v_proj\.v)_scale$")

_INT8_SCALES = (".k_scale", ".v_scale")

_SAME = (("bits", "w_bit"), ("group_size", "q_group_size"), ("sym",), ("zero_point",), ("quant_algo",))
"""Entries that two configs of one checkpoint have to agree about, under all of their names."""


@dataclass(frozen=True, slots=True)
class _Format:
    """One way to store linears.

    Attributes:
        marks: Tensors of which every quantized linear has one.
        parameters: All tensors below a linear's name that belong to it, but for its bias.
        read: Makes its weight.
    """

    marks: Sequence[str]
    parameters: Collection[str]
    read: Callable[[str, Stored, Mapping[str, Any]], Weight]


_FORMATS: Mapping[str, _Format] = {
    "gptq": _Format(gptq.MARKS, gptq.PARAMETERS, gptq.read),
    "awq": _Format(awq.MARKS, awq.PARAMETERS, awq.read),
    "compressed-tensors": _Format(
        compressed_tensors.MARKS, compressed_tensors.PARAMETERS, compressed_tensors.read
    ),
    "fp8": _Format(fp8.MARKS, fp8.PARAMETERS, fp8.read),
    "modelopt": _Format(fp8.MARKS, fp8.PARAMETERS, fp8.read_modelopt),
    "bitsandbytes": _Format(bitsandbytes.MARKS, bitsandbytes.PARAMETERS, bitsandbytes.read),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint says it is quantized.

    Attributes:
        method: One of the formats above.
        settings: What the format's reader looks at.
        file: The file beside ``config.json`` that was read for it; None where that itself says it.
    """

    method: str
    settings: Mapping[str, Any]
    file: str | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """The weights of a checkpoint under its own names, and what was left out."""

    weights: Mapping[str, Weight]
    notes: tuple[str, ...] = ()


def quantization_of(config: Mapping[str, Any], directory: Path) -> Quantization | None:
    """How the checkpoint in ``directory`` is quantized; None where nothing says that it is.

    Raises:
        InputError: Two files contradict each other.
        UnsupportedError: It is quantized in a way that no reader knows.
    """
    own = config.get("quantization_config") or config.get("compression_config")
    beside = {name: read_json(directory / name) for name in SIDE_FILES if (directory / name).is_file()}
    for name, settings in beside.items():
        settings = settings.get("quantization", settings)
        method = str(settings.get("quant_method") or SIDE_FILES[name])
        if not own:
            return _known({**settings, "quant_method": method}, directory, name)
        _check_same(own, settings, directory, name)
    return _known(own, directory, None) if own else None


def _known(settings: Mapping[str, Any], directory: Path, file: str | None) -> Quantization:
    method = str(settings.get("quant_method"))
    if method == "auto-round":
        method, settings = _auto_round(settings, directory)
    if method not in _FORMATS:
        raise UnsupportedError(
            f"{directory} is quantized by a method that llmopt cannot read: quant_method {method}",
            hint=f"it reads {', '.join([*_FORMATS, 'auto-round'])}; or take the checkpoint that this was made from",
        )
    return Quantization(method, settings, file)


def _auto_round(settings: Mapping[str, Any], directory: Path) -> tuple[str, Mapping[str, Any]]:
    """AutoRound packs as GPTQ or AWQ do; ``extra_config`` has the settings of single modules."""
    packing, data_type = str(settings.get("packing_format")), settings.get("data_type", "int")
    kind = next((name for name in ("gptq", "awq") if packing.endswith(name)), None)
    if kind is None or data_type != "int":
        raise UnsupportedError(
            f"{directory}: AutoRound's packing_format {packing} with data_type {data_type} is not supported",
            hint="supported: the packings of GPTQ and AWQ, integers",
        )
    single = {
        f"+:{re.escape(name)}$": changed
        for name, changed in (settings.get("extra_config") or {}).items()
        if changed.get("bits", 16) < 16
    }
    if kind == "awq":
        return kind, {**settings, "zero_point": not settings.get("sym", True)}
    return kind, {**settings, "dynamic": single}


def _check_same(own: Mapping[str, Any], other: Mapping[str, Any], directory: Path, name: str) -> None:
    for names in _SAME:
        values = [next((each[entry] for entry in names if entry in each), None) for each in (own, other)]
        if None not in values and values[0] != values[1]:
            raise InputError(
                f"{directory}: config.json and {name} contradict each other: {names[0]} is {values[0]} and {values[1]}",
                hint=f"correct one of them, or remove {name}",
            )


def read_quantized(tensors: Mapping[str, FileTensor], quantization: Quantization, where: object) -> Reading:
    """Every weight of a checkpoint: quantized linears as integers or FP8, all others as floats.

    Args:
        tensors: The checkpoint's, by name.
        quantization: What its config says.
        where: The checkpoint, for messages.

    Raises:
        InputError: It holds nothing quantized, tensors that contradict the config, or those of another format.
        UnsupportedError: It uses something of its format that nothing here can compute.
    """
    form, stored = _FORMATS[quantization.method], Stored(where, tensors)
    modules = stored.modules(form.marks)
    if not modules:
        raise InputError(
            f"{where} is quantized by {quantization.method}, as its config says, but holds no {form.marks[0]}",
            hint="config.json belongs to another checkpoint, or the weights were saved without being quantized",
        )
    weights = {f"{module}.weight": form.read(module, stored, quantization.settings) for module in modules}
    used = {f"{module}.{parameter}" for module in modules for parameter in form.parameters}
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    kept = _has_int8_cache(quantization.settings)
    scales = [name for name in rest if _CACHE_SCALES.search(name) and not (kept and name.endswith(_INT8_SCALES))]
    notes = (f"scales of a quantized cache are left out, it stays in float: {some(scales)}",) if scales else ()
    _refuse_other_formats([name for name in rest if name not in scales], quantization.method, where)
    floats = as_floats({name: tensor for name, tensor in rest.items() if name not in scales})
    return Reading({**floats, **weights}, notes)


def _has_int8_cache(settings: Mapping[str, Any]) -> bool:
    """Whether the cache is one that engines have: int8 with one scale for a layer's keys, and one for its values."""
    scheme = settings.get("kv_cache_scheme") or {}
    wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    return all(scheme.get(name) == value for name, value in wanted.items())


def _refuse_other_formats(names: Collection[str], method: str, where: object) -> None:
    foreign = {part for name, form in _FORMATS.items() for part in form.parameters} - {"weight"}
    mixed = [name for name in names if name.rpartition(".")[2] in foreign or ".weight." in name]
    if mixed:
        raise InputError(
            f"{where} is quantized by {method}, but holds tensors of no linear of that format: {some(mixed)}",
            hint="the checkpoint mixes formats, or config.json belongs to another one",
        )
