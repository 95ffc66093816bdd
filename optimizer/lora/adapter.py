"""A PEFT checkpoint fitted to a model: each of its tensors becomes a change of one of the model's weights.

Only headers are read, and a tensor that fits nowhere is refused. PEFT names modules as transformers does; the changes
are under our names.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from llmopt.optimizer.checkpoint import some
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.lora.changes import Change, LowRank
from llmopt.optimizer.lora.config import CONFIG_NAME, WEIGHTS_NAME, AdapterConfig, read_config
from llmopt.optimizer.lora.targets import Factors, Targets
from llmopt.optimizer.model import Model
from llmopt.optimizer.parameters import Parameter, expected_parameters
from llmopt.optimizer.tensor_file import FileTensor, read_header

__all__ = ["Adapter", "read_adapter"]

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+?)(?P<nested>([.]base_layer)*)[.]"
    r"(?P<part>lora_A[.]weight|lora_B[.]weight|lora_B[.]bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"([.]weight)?"
)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        folder: Where it lies.
        config: Its configuration.
        changes: What it does, by our parameter names.
    """

    folder: Path
    config: AdapterConfig
    changes: Mapping[str, Change]

    @property
    def is_low_rank(self) -> bool:
        """Whether it is nothing but products of two factors."""
        return all(isinstance(change, LowRank) for change in self.changes.values())

    def other_base(self, spec: str) -> str | None:
        """The base that it says it was trained on, where that is called otherwise than the model ``spec``."""
        trained_on = self.config.base_model_name_or_path
        if not trained_on or _last_part(trained_on) == _last_part(spec):
            return None
        return trained_on


def read_adapter(folder: Path, model: Model) -> Adapter:
    """The adapter in ``folder``, as it changes ``model``, which has the checkpoint's shapes.

    Raises:
        InputError: It is missing or damaged, or does not fit: it lacks a tensor, has one too many, or other shapes.
        UnsupportedError: It is of another kind, or has something that llmopt cannot compute.
    """
    config = read_config(folder)
    parameters = expected_parameters(model.config, model.arch, model.source.spec)
    factors, whole = _sorted_out(_tensors(folder), folder)
    targets = Targets(folder, config, parameters, model)
    changes = targets.changes(factors, whole)
    _refuse_missing(targets, config, parameters, factors, whole, folder)
    return Adapter(folder, config, changes)


def _last_part(name: str) -> str:
    """``HuggingFaceTB/SmolLM2-135M@1234`` -> ``smollm2-135m``."""
    return name.rstrip("/").rpartition("/")[2].partition("@")[0].lower()


def _tensors(folder: Path) -> Mapping[str, FileTensor]:
    path = folder / WEIGHTS_NAME
    try:
        return read_header(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is truncated or not a safetensors file: {error}", hint="copy or download the file again"
        ) from error


def _sorted_out(
    tensors: Mapping[str, FileTensor], folder: Path
) -> tuple[dict[tuple[str, int], Factors], dict[str, FileTensor]]:
    """The factors of each module and depth of nesting, and tensors that are a parameter's whole value, by its name."""
    factors: dict[tuple[str, int], Factors] = {}
    whole: dict[str, FileTensor] = {}
    foreign = [name for name in tensors if not name.startswith(_PREFIX)]
    if foreign or not tensors:
        raise InputError(
            f"{folder / WEIGHTS_NAME} is not PEFT's: {f'it holds {some(foreign)}' if foreign else 'it is empty'}",
            hint=f"names of PEFT's tensors begin with {_PREFIX}",
        )
    for name, tensor in tensors.items():
        below = name.removeprefix(_PREFIX)
        if (match := _FACTOR.fullmatch(below)) is None:
            whole[below] = tensor
            continue
        depth = match["nested"].count("base_layer")
        factors.setdefault((match["module"], depth), {})[match["part"]] = (name, tensor)
    return factors, whole


def _refuse_missing(
    targets: Targets,
    config: AdapterConfig,
    parameters: Mapping[str, Parameter],
    factors: Iterable[tuple[str, int]],
    whole: Iterable[str],
    folder: Path,
) -> None:
    """The configuration names modules of the model that the file has nothing for.

    Raises:
        InputError: See above.
    """
    adapted = {module for module, _ in factors}
    saved = {name.replace(".base_layer.", ".") for name in whole}
    missing = [
        module
        for module in _modules(parameters)
        if module not in adapted and config.target_modules != "all-linear" and config.targets_module(module)
    ]
    missing += [name for name in targets.aimed_at if name.rpartition(".")[0] not in adapted]
    missing += [
        name
        for name, parameter in parameters.items()
        if name not in saved and not parameter.is_stacked and _is_wanted_whole(name, config, adapted)
    ]
    if missing:
        raise InputError(
            f"{folder / WEIGHTS_NAME} lacks {some(missing)}, which {CONFIG_NAME} names",
            hint="the file is incomplete, or was trained on another model: "
            f"{config.base_model_name_or_path or 'it does not say on which'}",
        )


def _modules(parameters: Mapping[str, Parameter]) -> list[str]:
    """Modules that PEFT gives factors: linears and tables."""
    return [
        name.removesuffix(".weight")
        for name, parameter in parameters.items()
        if name.endswith(".weight") and len(parameter.shape) == 2
    ]


def _is_wanted_whole(name: str, config: AdapterConfig, adapted: Iterable[str]) -> bool:
    module, _, leaf = name.rpartition(".")
    if config.saves_module(module):
        return True
    return leaf == "bias" and (config.bias == "all" or (config.bias == "lora_only" and module in adapted))
