"""Texts for measuring: read from the file that ``--data`` names."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["raw_wikitext", "token_ids"]


def raw_wikitext(text: str) -> str:
    """Undo the marks that WikiText-2's token files put around hyphens and numbers, so that it reads as plain text."""
    for mark, plain in ((" <unk>", " unk"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        text = text.replace(mark, plain)
    return text


def token_ids(path: Path, tokenizer: Path) -> npt.NDArray[np.int64]:
    """The text's token ids, int64 ``[tokens]``, without special tokens.

    Args:
        path: The text.
        tokenizer: A tokenizer.json.
    """
    from tokenizers import Tokenizer

    text = raw_wikitext(path.read_text("utf-8"))
    return np.array(Tokenizer.from_file(str(tokenizer)).encode(text, add_special_tokens=False).ids, np.int64)
