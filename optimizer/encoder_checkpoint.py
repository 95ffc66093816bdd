"""An encoder's checkpoint: its config checked, and its weights under the names of the encoder alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmopt.optimizer.checkpoint import fit_to_shapes
from llmopt.optimizer.config_check import check_numbers
from llmopt.optimizer.encoder import EncoderArch
from llmopt.optimizer.encoder_module import encoder_module
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.model import DenseWeight, Weight

__all__ = ["check_encoder_config", "encoder_weights"]


def check_encoder_config(config: Mapping[str, Any], arch: EncoderArch) -> None:
    """Look at a config as it was read, before transformers does.

    Raises:
        UnsupportedError: It asks for a computation that transformers' module ignores, or that has no export.
        InputError: A number is not positive.
    """
    check_numbers(config)
    for name, values in arch.accepted.items():
        if config.get(name, values[0]) not in values:
            raise UnsupportedError(
                f"{name}: {str(config[name]).lower()} in config.json is not supported for {arch.name} models",
                hint=f"supported: {', '.join(str(value).lower() for value in values)}",
            )
    ropes = config.get("rope_parameters") or {}
    for name, rope in ropes.items() if isinstance(ropes, dict) else ():
        kind = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
        if kind != "default":
            raise UnsupportedError(
                f"rope type {kind!r} of {name} in config.json is not supported for encoders", hint="supported: default"
            )


def encoder_weights(
    stored: Mapping[str, DenseWeight], config: Mapping[str, Any], arch: EncoderArch, directory: Path
) -> dict[str, Weight]:
    """The encoder's weights out of a checkpoint that may have a head, pooler and prefix besides.

    Raises:
        InputError: Weights are missing, are there that belong to none of these, or have another shape.
    """
    try:
        network = encoder_module(config, device="meta")
    except (ValueError, TypeError, KeyError, RuntimeError, ArithmeticError, AssertionError) as error:
        raise InputError(f"{directory}: config.json describes no model: {error}", hint="correct config.json") from error
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    weights = {}
    for name, weight in stored.items():
        prefix = next((each for each in arch.prefixes if name.startswith(each)), "")
        own = name.removeprefix(prefix)
        if own in shapes or not own.startswith(arch.left_out):
            weights[own] = weight
    return fit_to_shapes(weights, shapes, directory)
