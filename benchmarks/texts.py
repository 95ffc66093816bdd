"""Texts for measuring: read from the file that ``--data`` names, or sampled from the model."""

from pathlib import Path

from llmopt.calibration.texts import read_tokens
from llmopt.optimizer.model import Model
from llmopt.optimizer.tokens import Tokens

__all__ = ["plain_text", "tokens_of"]

_MARKS = ((" <unk>", " unk"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))
"""What WikiText-2's token files put around hyphens and numbers, and plain text for it."""


def plain_text(path: Path, out: Path) -> Path:
    """A copy of a text below ``out`` that reads as plain text; only WikiText's token files have anything to undo."""
    text = path.read_text("utf-8")
    for mark, plain in _MARKS:
        text = text.replace(mark, plain)
    copy = out / "bench" / "texts" / f"{path.stem}.txt"
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(text, encoding="utf-8")
    return copy


def tokens_of(data: Path | None, model: Model, *, windows: int, tokens: int) -> Tokens:
    """Windows of the text in ``data``, else of text sampled from ``model``.

    Raises:
        InputError: The text is missing or too short.
    """
    if data is not None:
        return read_tokens(data, model.source.tokenizer_dir, windows=windows, tokens=tokens, name=data.name)
    from llmopt.calibration.sampling import Sampling, sample_tokens

    return sample_tokens(model, Sampling("evaluation", windows, tokens))
