"""Files that commands write results to."""

import os
from pathlib import Path

from llmopt.optimizer.errors import InputError

__all__ = ["check_writable"]


def check_writable(path: Path) -> None:
    """Whether a file can be written there, asked before the work for it begins.

    Raises:
        InputError: It is a directory, its directory does not exist, or one of them is read-only.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise InputError(f"{path} is a directory", hint="name a file in it")
    if not folder.is_dir():
        raise InputError(f"{folder} is no directory", hint="make it, or name a file elsewhere")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise InputError(f"{path} cannot be written to", hint="name a file elsewhere")
