"""Safetensors checkpoints, single or sharded: names and shapes at once, tensors mapped while they are in use."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError

from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.model import DenseWeight, Weight
from llmopt.optimizer.tensor_file import DTYPES, FileTensor, read_header

__all__ = [
    "INDEX_NAME",
    "WEIGHTS_NAME",
    "as_floats",
    "fit_to_shapes",
    "open_checkpoint",
    "some",
    "stored_names",
    "weight_files",
]

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point and dtype.itemsize > 1}
"""Without FP8, which stands for nothing without its scales."""

_BUFFERS = re.compile(
    r"(^|\.)((rotary_emb(_local)?|maybe_rotary)\.inv_freq|position_ids|attn\.(masked_)?bias|attention\.(masked_)?bias"
    r"|decoder\.version)$"
)
"""Buffers that older versions saved: tables computed from the config, causal masks, a version. ``attn`` and
``attention`` are no linears in any family, so nothing of theirs is a bias to add."""


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights of the checkpoint in ``directory``, the index first if there is one.

    Raises:
        InputError: There are none, the index cannot be read, or a shard that it names is missing.
    """
    index = directory / INDEX_NAME
    if index.is_file():
        return [index, *_shards(index)]
    single = directory / WEIGHTS_NAME
    if single.is_file():
        return [single]
    if any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
        raise InputError(
            f"{directory} has only pickled weights (.bin or .pth), and loading a pickle runs code from it",
            hint="convert it where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
        )
    raise InputError(
        f"{directory} has neither {WEIGHTS_NAME} nor {INDEX_NAME}",
        hint="a model directory holds config.json, safetensors files and tokenizer.json, as save_pretrained writes it",
    )


def open_checkpoint(directory: Path) -> dict[str, FileTensor]:
    """Every tensor of the checkpoint, by name, but for buffers; only headers are read.

    Raises:
        InputError: A file is missing or damaged, or the index contradicts the shards.
    """
    files = weight_files(directory)
    tensors = {path.name: _open(path) for path in files if path.name != INDEX_NAME}
    if files[0].name == INDEX_NAME:
        _check_index(files[0], tensors)
    return {name: tensor for shard in tensors.values() for name, tensor in shard.items() if not _BUFFERS.search(name)}


def as_floats(tensors: Mapping[str, FileTensor]) -> dict[str, DenseWeight]:
    """The weights that tensors of a checkpoint are when nothing is quantized.

    Raises:
        UnsupportedError: A tensor is not floating point.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise UnsupportedError(
                f"{tensor.path}: {name} has dtype {tensor.dtype}, and nothing says how it is quantized",
                hint=f"weights in float are {', '.join(_FLOATS)}; config.json of others has a quantization_config",
            )
    return {name: DenseWeight(tensor.shape, _FLOATS[tensor.dtype], tensor) for name, tensor in tensors.items()}


def stored_names(directory: Path) -> list[str]:
    """The names of the checkpoint's tensors, whatever they hold; none where they cannot be read."""
    try:
        files = weight_files(directory)
        return list(_weight_map(files[0]) if files[0].name == INDEX_NAME else read_header(files[0]))
    except (InputError, SafetensorError, OSError):
        return []


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index says."""
    try:
        entries = json.loads(index.read_bytes())["weight_map"]
        return {str(name): str(file) for name, file in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index} is not a safetensors index: {error!r}", hint="it needs a weight_map of tensor name to file name"
        ) from error


def _shards(index: Path) -> list[Path]:
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{index} names the file {name!r} outside its own directory")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InputError(
            f"{index} names {some(missing)}, which {'is' if len(missing) == 1 else 'are'} not there",
            hint="copy or download the missing shards",
        )
    return [index.parent / name for name in names]


def _check_index(index: Path, tensors: Mapping[str, Mapping[str, FileTensor]]) -> None:
    lost = [f"{name} (in {file})" for name, file in _weight_map(index).items() if name not in tensors[file]]
    lost = [entry for entry in lost if not _BUFFERS.search(entry.split(" ")[0])]
    if lost:
        raise InputError(
            f"{index} names tensors that their shards do not hold: {some(lost)}",
            hint="index and shards are from different checkpoints; fetch them again together",
        )


def _open(path: Path) -> dict[str, FileTensor]:
    try:
        return read_header(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or not a safetensors file: {error}",
            hint="copy or download the file again",
        ) from error


def fit_to_shapes(
    weights: Mapping[str, Weight], shapes: Mapping[str, tuple[int, ...]], where: object
) -> dict[str, Weight]:
    """The weights in the architecture's order, after checking that they are exactly what the config asks for.

    Args:
        weights: What the checkpoint holds.
        shapes: What the architecture needs: parameter name -> shape.
        where: The checkpoint, for messages.

    Raises:
        InputError: A weight is missing, is not part of the architecture, or has another shape.
    """
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise InputError(
            f"{where} lacks {len(missing)} of the {len(shapes)} weights that its config needs: {some(missing)}",
            hint="the checkpoint is incomplete, or config.json belongs to another model",
        )
    extra = [name for name in weights if name not in shapes]
    if extra:
        raise InputError(
            f"{where} holds {len(extra)} weights that its config has no place for: {some(extra)}",
            hint="without them it would be another model; see num_hidden_layers and *_bias in config.json",
        )
    wrong = [f"{name} is {list(weights[name].shape)}, not {list(shape)}" for name, shape in shapes.items()
             if weights[name].shape != shape]  # fmt: skip
    if wrong:
        raise InputError(f"{where} does not fit its config: {some(wrong)}", hint="config.json belongs to another model")
    return {name: weights[name] for name in shapes}


def some(names: list[str], limit: int = 4) -> str:
    """The first few of a list for a message, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
