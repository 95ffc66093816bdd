"""``config.json``: read, and completed by transformers' config class."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmopt.optimizer.arch.base import Arch
from llmopt.optimizer.encoder import EncoderArch
from llmopt.optimizer.errors import InputError

__all__ = ["complete", "read_json"]

# Says where a config came from, how weights are stored or how a call should answer, not what the model computes.
_INCIDENTAL = {
    "_attn_implementation_autoset",
    "_model_name_or_path",
    "_name_or_path",
    "auto_map",
    "compression_config",
    "output_attentions",
    "output_hidden_states",
    "quantization_config",
    "return_dict",
    "transformers_version",
}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: The file is missing, is not JSON, or holds something else than an object.
    """
    if not path.is_file():
        raise InputError(
            f"{path} does not exist", hint="a model directory holds config.json, safetensors files and tokenizer.json"
        )
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}", hint="copy or download the file again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def complete(config: Mapping[str, Any], arch: Arch | EncoderArch, where: object) -> dict[str, Any]:
    """The config with every default its family has, in the current spelling.

    Older checkpoints leave out ``head_dim`` or ``num_key_value_heads`` and write ``rope_theta`` and ``rope_scaling``
    where newer ones have ``rope_parameters``. transformers' config class knows both; the result can be indexed.

    Raises:
        InputError: A value has the wrong type or contradicts another.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    given = {name: value for name, value in config.items() if name not in _INCIDENTAL | {"model_type"}}
    try:
        made = AutoConfig.for_model(_model_type(config, arch), **given)
        full = json.loads(made.to_json_string(use_diff=True))
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        said = str(error.args[0] if isinstance(error, KeyError) else error).strip().splitlines()[-1]
        reason = re.sub(r"^\w+Error: ", "", said.strip())
        raise InputError(f"{where}: config.json cannot be used: {reason}", hint="correct config.json") from error
    # What the class does not declare, transformers keeps but does not obey: nor does the resolver.
    declared = type(made)().to_dict().keys() | made.attribute_map.keys()
    full = {name: value for name, value in full.items() if name in declared and name not in _INCIDENTAL}
    # GPT-2 has n_layer where others have num_hidden_layers: the standard spelling is there beside its own.
    full |= {name: full[own] for name, own in made.attribute_map.items() if own in full and name not in full}
    model_types = {model_type: name for name, model_type in arch.models.items()}
    full["architectures"] = list(config.get("architectures") or [model_types[made.model_type]])
    return full


def _model_type(config: Mapping[str, Any], arch: Arch | EncoderArch) -> str:
    """The model_type of a config; the architecture decides, as it does for what is computed."""
    architectures = config.get("architectures") or [""]
    return arch.models.get(str(architectures[0])) or str(config["model_type"])
