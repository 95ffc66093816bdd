"""``adapter_config.json``: what a PEFT adapter is, and by PEFT's own rules which modules it speaks of."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from llmopt.optimizer.checkpoint import some
from llmopt.optimizer.errors import InputError, LlmoptError, UnsupportedError
from llmopt.optimizer.hf_config import read_json
from llmopt.optimizer.recipe_path import Located, RecipePath

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "AdapterConfig", "AdapterPath", "read_config"]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")

_UNSUPPORTED = {
    "alora_invocation_tokens": "it acts behind certain tokens of a text only",
    "arrow_config": "it routes each token among other adapters",
    "kasa_config": "KaSA changes the base weights as well",
    "layer_replication": "it repeats layers of the base",
    "megatron_config": "its linears are Megatron's",
    "monteclora_config": "MonteCLoRA draws its factors at random",
    "trainable_token_indices": "it replaces single rows of a table",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "it averages inputs in groups",
    "velora_config": "VeLoRA is not known to be plain LoRA when it is run",
}
"""Entries that change what an adapter computes -> how."""

_INCIDENTAL = {
    "auto_mapping", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
"""Entries that say how it was trained or is stored; PEFT corrects ``fan_in_fan_out`` by the module's kind."""

_PLAIN_STARTS = {"gaussian", "eva", "orthogonal"}
"""Ways to begin training that leave the base as it is. Others train the rest of a decomposition of its weights."""


class AdapterConfig(BaseModel):
    """A LoRA adapter's configuration; fields are PEFT's ``LoraConfig``'s, which documents them."""

    model_config = ConfigDict(frozen=True, extra="allow")

    peft_type: str
    base_model_name_or_path: str | None = None
    r: int = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    ensure_weight_tying: bool = False
    init_lora_weights: bool | str = True

    def rank_of(self, key: str) -> int:
        """The rank of the factors of the module, or parameter, that PEFT calls ``key``."""
        patterns = self.rank_pattern or {}
        return patterns.get(_pattern_key(patterns, key), self.r)

    def scaling_of(self, key: str) -> float:
        """What the product of its factors is multiplied with."""
        patterns = self.alpha_pattern or {}
        alpha, rank = patterns.get(_pattern_key(patterns, key), self.lora_alpha), self.rank_of(key)
        return float(alpha / rank**0.5 if self.use_rslora else alpha / rank)

    def targets_module(self, key: str) -> bool:
        """Whether the module called ``key`` has factors."""
        saved = self.modules_to_save or ()
        if _names(self.exclude_modules, key) or any(re.match(rf"(^|.*\.){name}($|\..*)", key) for name in saved):
            return False
        if isinstance(self.target_modules, str) or key in (self.target_modules or ()):
            return _names(self.target_modules, key)
        return _names(self.target_modules, key) and self._is_in_layers(key)

    def targets_parameter(self, key: str) -> bool:
        """Whether the parameter called ``key`` has factors by ``target_parameters``."""
        return _names(self.target_parameters, key)

    def saves_module(self, key: str) -> bool:
        """Whether the module called ``key``, or one that it is in, is saved whole: names are ends, of words as well."""
        parts = key.split(".")
        around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        return any(module.endswith(name) for module in around for name in self.modules_to_save or ())

    def _is_in_layers(self, key: str) -> bool:
        if self.layers_to_transform is None or self.layers_to_transform == ():
            return True
        patterns = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern
        expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns or ()] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for each in expressions if (match := re.match(each, key))), None)
        layers = self.layers_to_transform
        return found is not None and int(found[1]) in ((layers,) if isinstance(layers, int) else layers)


def _pattern_key(patterns: Mapping[str, Any], key: str) -> str:
    """The first pattern that matches the end of ``key``, as PEFT's ``get_pattern_key``; else ``key``."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", key)), key)


def _names(named: Collection[str] | str | None, key: str) -> bool:
    """Whether ``key`` is one of the names or ends with one; a text is an expression for all of it."""
    if isinstance(named, str):
        return re.fullmatch(named, key) is not None
    return any(key == name or key.endswith(f".{name}") for name in named or ())


def read_config(folder: Path) -> AdapterConfig:
    """The configuration of the adapter in ``folder``, which is one that can be used.

    Raises:
        InputError: There is no adapter, it is a pickle, or its configuration is damaged.
        UnsupportedError: It is of another kind, or has something that llmopt cannot compute.
    """
    _check_files(folder)
    given = read_json(folder / CONFIG_NAME)
    kind = given.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"{folder} is an adapter of the type {kind}, and llmopt reads LORA",
            hint="with PEFT, merge_and_unload() and save_pretrained() make a model of it and its base",
        )
    try:
        config = AdapterConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{folder / CONFIG_NAME}: {where}: {first['msg'].lower()}", hint="correct the file") from error
    _check_kind(config, folder)
    _check_numbers(config, folder)
    return config


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(
            f"there is no adapter {folder}" if not folder.exists() else f"{folder} is a file, not an adapter's folder",
            hint=f"an adapter is a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, as PEFT's save_pretrained writes it",
        )
    pickles = [name for name in _PICKLES if (folder / name).is_file()]
    if pickles and not (folder / WEIGHTS_NAME).is_file():
        raise InputError(
            f"{folder} has its weights in {pickles[0]}, a pickle, and loading a pickle runs code from it",
            hint="convert it where you trust it: PeftModel.from_pretrained(...).save_pretrained(...)",
        )
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]
    if missing:
        below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        what = "it is a model" if (folder / "config.json").is_file() else "PEFT's save_pretrained writes both files"
        hint = f"folders in it that are adapters: {some(below)}" if below else what
        raise InputError(f"{folder} lacks {' and '.join(missing)}", hint=hint)


def _check_kind(config: AdapterConfig, folder: Path) -> None:
    extra = config.model_extra or {}
    for name, reason in _UNSUPPORTED.items():
        if extra.get(name):
            raise UnsupportedError(
                f"{folder} is LoRA with {name}, which llmopt cannot compute: {reason}",
                hint="where PEFT can, merge_and_unload() and save_pretrained() make a model of it",
            )
    unknown = [name for name, value in extra.items() if value and name not in _INCIDENTAL]
    if unknown:
        raise UnsupportedError(
            f"{folder / CONFIG_NAME} has entries that llmopt does not know: {some(unknown)}",
            hint="remove those that do not change what the adapter computes",
        )
    start = config.init_lora_weights
    if isinstance(start, str) and start not in _PLAIN_STARTS:
        raise UnsupportedError(
            f"{folder} was trained from init_lora_weights: {start}, on other weights than its base's",
            hint="save_pretrained(..., path_initial_model_for_weight_conversion=...) makes a plain LoRA of it",
        )


def _check_numbers(config: AdapterConfig, folder: Path) -> None:
    ranks = {"r": config.r, **{f"rank_pattern {name!r}": rank for name, rank in (config.rank_pattern or {}).items()}}
    for name, rank in ranks.items():
        if rank < 1:
            raise InputError(f"{folder}: {name} is {rank}, and a rank is at least 1", hint=f"correct {CONFIG_NAME}")
    named = (config.target_modules, config.exclude_modules)
    expressions = [each for each in named if isinstance(each, str)]
    for expression in (*expressions, *(config.rank_pattern or ()), *(config.alpha_pattern or ())):
        try:
            re.compile(expression)
        except re.error as error:
            raise InputError(
                f"{folder}: {expression!r} is no regular expression: {error}", hint=f"correct {CONFIG_NAME}"
            ) from error


def _checked(path: Located) -> Located:
    try:
        read_config(path.place)
    except LlmoptError as error:
        raise ValueError(f"{error.message}; {error.hint}") from error
    return path


AdapterPath: TypeAlias = Annotated[RecipePath, AfterValidator(_checked)]
"""The type of an option that names an adapter's folder, which must hold one that llmopt can read."""
