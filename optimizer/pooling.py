"""How an encoder's vectors of tokens become one of a text, as the files of sentence-transformers say it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.hf_config import read_json
from llmopt.optimizer.tokenizer_config import read_object

__all__ = ["POOLING_FILES", "Pooling", "PoolingMode", "read_pooling"]

PoolingMode = Literal["mean", "cls", "max", "mean_sqrt_len_tokens", "lasttoken"]

_LONG_NAMES: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""What sentence-transformers wrote until its version 5, each true or false."""

_MODULES, _PROMPTS = "modules.json", "config_sentence_transformers.json"
_SETTINGS = "sentence_bert_config.json"
POOLING_FILES = (_MODULES, _PROMPTS, _SETTINGS)
"""Beside the configs of the modules that modules.json names."""


@dataclass(frozen=True, slots=True)
class Pooling:
    """One vector of a text's token vectors.

    Attributes:
        mode: mean, max and mean_sqrt_len_tokens are of all tokens, special ones included: the sum over the number of
            tokens, the largest of each column, the sum over the root of the number. cls is the first token's vector,
            lasttoken the last one's.
        normalize: Whether the vector is divided by its Euclidean length.
        max_tokens: What longer texts are cut to, special tokens included; None: the model's positions.
        prompts: What texts are read behind, by name.
        default_prompt: The name of the one for texts of which nothing else is said; None: they are read as they are.
        is_given: Whether files said so; else it is what sentence-transformers does without any.
    """

    mode: PoolingMode = "mean"
    normalize: bool = False
    max_tokens: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    is_given: bool = False


def read_pooling(directory: Path) -> tuple[Pooling, list[str]]:
    """What the files of sentence-transformers in ``directory`` say, and their names.

    Raises:
        InputError: A file is damaged or missing, or contradicts itself.
        UnsupportedError: A vector is made in a way that no engine of llmopt computes.
    """
    if not (directory / _MODULES).is_file():
        return Pooling(), []
    modules = _modules(directory / _MODULES)
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise UnsupportedError(
            f"{directory / _MODULES} lists {', '.join(kinds) or 'no modules'}",
            hint="llmopt compiles Transformer, Pooling and, behind them, Normalize",
        )
    transformer, pooling = (path for _, path in modules[:2])
    config = f"{pooling}/config.json"
    settings = f"{transformer}/{_SETTINGS}".lstrip("/")
    names = [name for name in (*POOLING_FILES, settings) if (directory / name).is_file()]
    prompts, default = _prompts(directory / _PROMPTS)
    found = Pooling(
        mode=_mode(directory / config),
        normalize=len(kinds) == 3,
        max_tokens=_max_tokens(directory / settings),
        prompts=prompts,
        default_prompt=default,
        is_given=True,
    )
    return found, [*dict.fromkeys(names), config]


def _modules(path: Path) -> list[tuple[str, str]]:
    """The class and the folder of each module, in order."""
    try:
        entries = json.loads(path.read_bytes())
        return [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} is no list of modules with type and path: {error!r}", hint="copy or download the file again"
        ) from error


def _mode(path: Path) -> PoolingMode:
    config = read_json(path)
    modes = [mode for name, mode in _LONG_NAMES.items() if config.get(name)]
    named = config.get("pooling_mode", modes or "mean")
    named = [named] if isinstance(named, str) else list(named)
    if "pooling_mode" in config and modes and modes != named:
        raise InputError(
            f"{path} says pooling_mode {', '.join(named)} and {', '.join(modes)}", hint="leave one of them"
        )
    if len(named) != 1 or named[0] not in get_args(PoolingMode):
        raise UnsupportedError(
            f"{path} asks for pooling by {' and '.join(map(str, named))}",
            hint=f"supported, one at a time: {', '.join(get_args(PoolingMode))}",
        )
    if config.get("include_prompt") is False:
        raise UnsupportedError(
            f"{path} leaves the prompt out of the pooling (include_prompt: false)",
            hint="llmopt pools every token that is not padding",
        )
    mode: PoolingMode = named[0]
    return mode


def _max_tokens(path: Path) -> int | None:
    settings = read_object(path)
    if settings.get("do_lower_case"):
        raise UnsupportedError(
            f"{path} has texts lowercased before they are read (do_lower_case)",
            hint="use a tokenizer that lowercases, and set it to false",
        )
    longest = settings.get("max_seq_length")
    if longest is not None and not (isinstance(longest, int) and longest > 0):
        raise InputError(f"max_seq_length in {path} is {longest!r}, not a positive number", hint="correct it")
    return longest


def _prompts(path: Path) -> tuple[dict[str, str], str | None]:
    """Name -> prompt, and the name of the default."""
    config: dict[str, Any] = read_object(path)
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict) or (default is not None and default not in prompts):
        raise InputError(
            f"default_prompt_name in {path} is {default!r}, and prompts has no such entry", hint="correct it"
        )
    return {str(name): str(prompt) for name, prompt in prompts.items()}, default
