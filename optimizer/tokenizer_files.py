"""What is needed beside the weights to talk to a model, in one place and one form, whatever it came from.

Checkpoints differ: the chat template is a file or a field of tokenizer_config.json, the stop tokens are in
generation_config.json or only in config.json, and tokenizer.json may be missing. The runtime sees none of that.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmopt.optimizer.cache import digest_of, locked, publish
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.hf_config import read_json

__all__ = ["TOKENIZER_FILES", "convert_gguf", "prepare"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
)
"""Files of a checkpoint that decide about tokens; most checkpoints have a few of them."""

_LAYOUT = 1
"""Counts changes of what this module writes, because the cache must not answer with an older form."""

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def prepare(directory: Path, config: Mapping[str, Any], digests: Mapping[str, str], cache: Path) -> Path:
    """A directory with tokenizer.json and its companions, made from a checkpoint's files once.

    Args:
        directory: The checkpoint.
        config: Its completed config; written as config.json, and used where generation_config.json is silent.
        digests: Name -> sha256 of those of ``TOKENIZER_FILES`` that the checkpoint has.
        cache: Where the directory is kept.

    Raises:
        InputError: The checkpoint has no tokenizer, or one that cannot be read.
    """
    key: dict[str, Any] = {"files": dict(digests), "config": dict(config)}
    if "tokenizer.json" not in digests:
        key["transformers"] = _transformers_version()
    with _once(key, cache) as (final, partial):
        if partial:
            if "tokenizer.json" in digests:
                read_json(directory / "tokenizer.json")
                shutil.copyfile(directory / "tokenizer.json", partial / "tokenizer.json")
                for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
                    if name in digests:
                        shutil.copyfile(directory / name, partial / name)
            else:
                _convert(directory, partial)
            given = read_json(directory / "generation_config.json") if "generation_config.json" in digests else {}
            _finish(partial, config, given)
    return final


def convert_gguf(path: Path, metadata: Mapping[str, Any], sha256: str, cache: Path) -> Path:
    """A directory like a checkpoint's, without weights, with what transformers makes of a GGUF file's metadata.

    Args:
        path: The file.
        metadata: From its header; tokens that end a turn or a message stop generation beside the end of text.
        sha256: Of the file.
        cache: Where the directory is kept.

    Raises:
        InputError: The file's tokenizer or hyperparameters cannot be read.
    """
    with _once({"converted": sha256, "transformers": _transformers_version()}, cache) as (final, partial):
        if partial:
            from transformers import PreTrainedConfig, PreTrainedTokenizerFast

            try:
                with _alone(path) as folder:
                    config, _ = PreTrainedConfig.get_config_dict(folder, gguf_file=path.name)
                    PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=path.name).save_pretrained(partial)
            except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
                raise InputError(f"{path}: its tokenizer or hyperparameters cannot be read: {error}") from error
            ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
            stops = list(dict.fromkeys(token for token in ends if token is not None))
            if len(stops) > 1:
                _write(partial / "generation_config.json", {"eos_token_id": stops})
            _write(partial / "config.json", config)
    return final


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """A directory with a link to the file and nothing else: transformers would also read the file's neighbours."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        yield Path(folder)


@contextmanager
def _once(key: Mapping[str, Any], cache: Path) -> Iterator[tuple[Path, Path | None]]:
    """Yield the finished directory, and one to fill when it does not exist yet."""
    final = cache / "tokenizers" / digest_of({"layout": _LAYOUT, **key})
    with locked(final):
        if final.is_dir():
            yield final, None
        else:
            with publish(final) as partial:
                yield final, partial


def _convert(directory: Path, partial: Path) -> None:
    """Make tokenizer.json from an older format."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, use_fast=True, local_files_only=True)
    except ImportError as error:
        raise UnsupportedError(
            f"{directory} has no tokenizer.json, and converting its tokenizer needs a package that is not installed: "
            f"{str(error).strip().splitlines()[0]}",
            hint="install it, or save the model with a fast tokenizer",
        ) from error
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{directory} has no tokenizer.json, and no other tokenizer that can be converted to one",
            hint="put the model's tokenizer.json and tokenizer_config.json into the directory",
        ) from error
    if len(tokenizer.get_vocab()) <= len(tokenizer.get_added_vocab()):  # what transformers makes of no file at all
        raise InputError(
            f"{directory} has no tokenizer.json, and its tokenizer has no vocabulary but special tokens",
            hint="put the model's tokenizer.json and tokenizer_config.json into the directory",
        )
    tokenizer.save_pretrained(partial)
    if not (partial / "tokenizer.json").is_file():
        raise InputError(
            f"{directory} has only a slow tokenizer ({type(tokenizer).__name__}), which has no tokenizer.json",
            hint="put a tokenizer.json into the directory",
        )


def _finish(partial: Path, config: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Bring what was copied or saved to the one form, and add the configs."""
    settings = partial / "tokenizer_config.json"
    tokenizer = read_json(settings) if settings.is_file() else {}
    template = tokenizer.pop("chat_template", None)
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if isinstance(template, str) and not (partial / "chat_template.jinja").exists():
        (partial / "chat_template.jinja").write_text(template, encoding="utf-8")
    for name in ("is_local", "local_files_only", "name_or_path"):
        tokenizer.pop(name, None)
    _write(settings, tokenizer)
    ids = {name: config[name] for name in _TOKEN_IDS if config.get(name) is not None}
    generation = {name: value for name, value in given.items() if value is not None and not name.startswith("_")}
    generation.pop("transformers_version", None)
    _write(partial / "generation_config.json", ids | generation)
    _write(partial / "config.json", config)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _transformers_version() -> str:
    import transformers

    return str(transformers.__version__)
