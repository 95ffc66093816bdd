"""FP8 E4M3 checkpoints: Hugging Face's ``fp8`` (DeepSeek's blocks, AutoFP8's tensors) and ModelOpt's FP8.

Layout: ``weight`` E4M3 ``[out, in]``; its scale is called ``weight_scale_inv`` or ``weight_scale`` and is multiplied
with, whatever the name; a static scale of inputs is ``activation_scale`` or ``input_scale``.
"""

from collections.abc import Mapping
from typing import Any

from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.model import QuantTensors, QuantWeight
from llmopt.optimizer.quantized.stored import FLOATS, Stored
from llmopt.optimizer.scheme import PRESETS, QuantSpec, Scheme
from llmopt.optimizer.tensor_file import FileTensor

__all__ = ["MARKS", "PARAMETERS", "read", "read_modelopt"]

MARKS = ("weight_scale_inv", "weight_scale")

PARAMETERS = frozenset({"weight", "weight_scale_inv", "weight_scale", "activation_scale", "input_scale"})

_MODELOPT = {"FP8": "FP8", "FP8_PER_CHANNEL_PER_TOKEN": "FP8_DYNAMIC"}
"""ModelOpt's ``quant_algo`` -> our preset."""


def read(module: str, stored: Stored, quantization: Mapping[str, Any]) -> QuantWeight:
    """One linear of a checkpoint with ``quant_method: fp8``.

    Raises:
        InputError: A tensor is missing or does not fit the config.
        UnsupportedError: The config asks for activations that are rounded in another way.
    """
    activations, block = quantization.get("activation_scheme", "dynamic"), quantization.get("weight_block_size")
    if activations not in ("dynamic", "static") or quantization.get("expert_dtype", "fp8") != "fp8":
        raise UnsupportedError(
            f"{stored.where}: fp8 with activation_scheme: {activations} is not supported",
            hint="supported: dynamic and static, experts in fp8",
        )
    if block is None:
        inputs = PRESETS["FP8" if activations == "static" else "FP8_DYNAMIC"].input_activations
        return _linear(module, stored, Scheme(weights=PRESETS["FP8"].weights, input_activations=inputs))
    if activations == "static":
        raise UnsupportedError(
            f"{stored.where}: fp8 in blocks with static activations is not supported", hint="supported: dynamic"
        )
    weights = QuantSpec.model_validate(
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": list(block)}
    )
    inputs = QuantSpec.model_validate(
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": block[1], "dynamic": True}
    )
    return _linear(module, stored, Scheme(weights=weights, input_activations=inputs))


def read_modelopt(module: str, stored: Stored, quantization: Mapping[str, Any]) -> QuantWeight:
    """One linear of a checkpoint that ModelOpt wrote.

    Raises:
        InputError: A tensor is missing or does not fit the config.
        UnsupportedError: It is quantized in another way than to FP8.
    """
    algorithm = str(quantization.get("quant_algo"))
    if algorithm not in _MODELOPT:
        raise UnsupportedError(
            f"{stored.where}: ModelOpt's quant_algo {algorithm} is not supported",
            hint=f"supported: {', '.join(_MODELOPT)}",
        )
    return _linear(module, stored, PRESETS[_MODELOPT[algorithm]])


def _linear(module: str, stored: Stored, scheme: Scheme) -> QuantWeight:
    numbers = stored.take(f"{module}.weight", ("F8_E4M3",), (None, None))
    rows, columns = numbers.shape
    shape, spec = scheme.weights.scale_shape(rows, columns), scheme.weights
    scale = _named(module, stored, ("weight_scale_inv", "weight_scale"))
    if spec.strategy == "tensor":
        stored.one(scale)
    elif spec.strategy == "channel":
        stored.take(scale, FLOATS, (rows,) if len(stored.tensors[scale].shape) == 1 else (rows, 1))
    else:
        stored.take(scale, (*FLOATS, "F8_E8M0"), shape)
    entering: FileTensor | None = None
    if scheme.needs_input_scale:
        entering = stored.one(_named(module, stored, ("activation_scale", "input_scale")))

    def load() -> QuantTensors:
        inputs = None if entering is None else entering().float().reshape(1)
        scales = stored.tensors[scale]().float().reshape(shape)
        return QuantTensors(numbers(), scales, None, inputs, spec.block_structure)

    return QuantWeight((rows, columns), scheme, load)


def _named(module: str, stored: Stored, names: tuple[str, str]) -> str:
    """The one of two tensors that is there."""
    found = [f"{module}.{name}" for name in names if f"{module}.{name}" in stored.tensors]
    if len(found) != 1:
        what = " and ".join(found) if found else f"neither {' nor '.join(f'{module}.{name}' for name in names)}"
        raise InputError(
            f"{stored.where} holds {what}", hint="one of them is expected: the checkpoint is damaged or mixed"
        )
    return found[0]
