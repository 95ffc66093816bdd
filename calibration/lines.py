"""The lines of a text file as texts of their own, which is how encoders are measured."""

import hashlib
from pathlib import Path

import torch

from llmopt.calibration.encoding import open_tokenizer
from llmopt.calibration.texts import decoded
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.tokens import Tokens

__all__ = ["read_lines"]


def read_lines(path: Path, tokenizer_dir: Path, *, lines: int, tokens: int, name: str | None = None) -> Tokens:
    """The first lines that are not empty, with the special tokens that the tokenizer puts around a text.

    Args:
        path: UTF-8 text.
        tokenizer_dir: Holds tokenizer.json.
        lines: How many.
        tokens: What longer lines are cut to, special tokens included.
        name: What to call the text; None means the path as given.

    Returns:
        A window for each line, padded on its right with zeros.

    Raises:
        InputError: The file is missing, not UTF-8, or has fewer lines; or there is no tokenizer.
    """
    content, text = decoded(path)
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if len(found) < lines:
        raise InputError(f"{path} has {len(found)} lines of text, not {lines}", hint=f"windows: {len(found)} would fit")
    tokenizer = open_tokenizer(tokenizer_dir)
    tokenizer.enable_truncation(tokens)
    encoded = [entry.ids for entry in tokenizer.encode_batch(found[:lines])]
    lengths = torch.tensor([len(ids) for ids in encoded])
    ids = torch.zeros(lines, int(lengths.max()), dtype=torch.int64)
    for row, line in zip(ids, encoded, strict=True):
        row[: len(line)] = torch.tensor(line)
    digest = hashlib.sha256(content).hexdigest()
    return Tokens(name=name or str(path), ids=ids, digest=digest, lengths=lengths)
