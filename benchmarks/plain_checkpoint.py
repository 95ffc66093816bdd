"""Writes a model as a plain Hugging Face checkpoint, which other programs can read whatever it came from."""

import json
import shutil
from pathlib import Path

from llmopt.optimizer.cache import publish
from llmopt.optimizer.model import Model

__all__ = ["write_checkpoint"]


def write_checkpoint(model: Model, directory: Path) -> Path:
    """Save ``model`` in float32: one safetensors file, config and tokenizer. A directory that exists is kept.

    Returns:
        ``directory``.
    """
    from safetensors.torch import save_file

    if directory.is_dir():
        return directory
    with publish(directory) as partial:
        tensors = {name: weight.dense().contiguous() for name, weight in model.weights.items()}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        config = {**model.config, "dtype": "float32"}
        (partial / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        for path in model.source.tokenizer_dir.iterdir():
            if path.suffix in {".json", ".jinja"} and not (partial / path.name).exists():
                shutil.copyfile(path, partial / path.name)
    return directory
