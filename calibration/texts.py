"""The beginning of a text file as windows of tokens, which is how evaluation takes it."""

import hashlib
from pathlib import Path

import torch

from llmopt.calibration.encoding import open_tokenizer
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.tokens import Tokens

__all__ = ["decoded", "read_tokens"]


def read_tokens(path: Path, tokenizer_dir: Path, *, windows: int, tokens: int, name: str | None = None) -> Tokens:
    """Cut the beginning of a text file into windows. The text is taken as it is, special tokens only as the tokenizer
    adds them to any text.

    Args:
        path: UTF-8 text.
        tokenizer_dir: Holds tokenizer.json.
        windows: How many, one behind the other from the start of the text.
        tokens: Tokens per window.
        name: What to call the text; None means the path as given.

    Raises:
        InputError: The file is missing, not UTF-8, or too short; or there is no tokenizer.
    """
    content, text = decoded(path)
    ids = open_tokenizer(tokenizer_dir).encode(text).ids
    if len(ids) < windows * tokens:
        raise InputError(
            f"{path} has {len(ids)} tokens, {windows} windows of {tokens} need {windows * tokens}",
            hint=_fit(len(ids), tokens),
        )
    cut = torch.tensor(ids[: windows * tokens], dtype=torch.int64).reshape(windows, tokens)
    return Tokens(name=name or str(path), ids=cut, digest=hashlib.sha256(content).hexdigest())


def decoded(path: Path) -> tuple[bytes, str]:
    """A file's contents, and the text they are.

    Raises:
        InputError: It is missing or not UTF-8.
    """
    content = _content(path)
    try:
        return content, content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}",
            hint="convert it, for example with iconv",
        ) from error


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the text {path}: {error.strerror}") from error


def _fit(found: int, tokens: int) -> str:
    if found >= tokens:
        return f"windows: {found // tokens} would fit; or give a longer text"
    return "give a longer text, or take shorter windows" if found else "the file is empty"
