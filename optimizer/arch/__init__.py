"""One declarative file per model family, found by the architecture's name in ``config.json`` or in a GGUF file."""

import importlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmopt.optimizer.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from llmopt.optimizer.arch.base import Arch
    from llmopt.optimizer.encoder import EncoderArch

__all__ = ["find", "find_gguf", "known", "known_encoders"]


def known() -> "list[Arch]":
    """Every family of decoders that llmopt can compile, by file name."""
    from llmopt.optimizer.arch.base import Arch

    return [arch for arch in _all() if isinstance(arch, Arch)]


def known_encoders() -> "list[EncoderArch]":
    """Every family of encoders, by file name."""
    from llmopt.optimizer.encoder import EncoderArch

    return [arch for arch in _all() if isinstance(arch, EncoderArch)]


def _all() -> "list[Arch | EncoderArch]":
    files = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    names = [name for name in files if not name.startswith("_") and name != "base"]
    return [importlib.import_module(f"{__name__}.{name}").ARCH for name in names]


def find(config: Mapping[str, Any], parameters: Callable[[], Collection[str]] = list) -> "Arch | EncoderArch":
    """The family of a checkpoint with this ``config.json``; without ``architectures`` its ``model_type`` decides.

    Args:
        config: As it was read.
        parameters: Gives the names of the checkpoint's weights, to say how it differs from what is supported.

    Raises:
        UnsupportedError: No file of this folder covers it.
        InputError: ``architectures`` is no list of names.
    """
    families: list[Arch | EncoderArch] = [*known(), *known_encoders()]
    architectures = config.get("architectures")
    if architectures is not None:
        wanted = _first_name(architectures)
        by_name = {name: arch for arch in families for name in arch.models}
    else:
        wanted = str(config.get("model_type") or "")
        by_name = {model_type: arch for arch in families for model_type in arch.models.values()}
    if wanted not in by_name:
        from llmopt.optimizer.nearest_family import refusal

        raise refusal(config, parameters(), known())
    return by_name[wanted]


def _first_name(architectures: object) -> str:
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise InputError(
            f"architectures in config.json is {architectures!r}, not a list of names",
            hint='write a list as ["LlamaForCausalLM"]; without the entry model_type decides',
        )
    return architectures[0]


def find_gguf(name: str) -> "Arch":
    """The family of a GGUF file whose ``general.architecture`` is ``name``.

    Raises:
        UnsupportedError: No file of this folder covers it.
    """
    by_name = {arch.gguf: arch for arch in known() if arch.gguf}
    if name not in by_name:
        raise UnsupportedError(
            f"GGUF architecture {name} is not supported",
            hint=f"supported: {', '.join(sorted(by_name))}; other families are read from safetensors checkpoints",
        )
    return by_name[name]
