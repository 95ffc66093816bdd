"""Every error a user can meet, each with the exit code the command ends with."""

import errno
from dataclasses import dataclass
from typing import ClassVar

__all__ = [
    "InputError",
    "LlmoptError",
    "MissingExtraError",
    "PassError",
    "Problem",
    "RecipeError",
    "RejectedError",
    "ResourceError",
    "UnsupportedError",
    "VerificationError",
    "is_out_of_memory",
]


class LlmoptError(Exception):
    """An expected failure: the command prints ``error:`` and ``hint:`` and no traceback.

    Args:
        message: What is wrong and where, in one sentence.
        hint: What the user can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(LlmoptError):
    """Something the user named (a file, an option, a model) is missing, damaged or contradictory."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a recipe, printed as ``file:line: path: what`` followed by the hint."""

    file: str
    line: int
    path: str
    what: str
    hint: str | None = None

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: {self.path}: " if self.path else f"{self.file}:{self.line}: "
        return where + self.what + (f"  hint: {self.hint}" if self.hint else "")


class RecipeError(InputError):
    """A recipe that cannot be built, with all of its mistakes at once."""

    def __init__(self, problems: list[Problem]) -> None:
        count = len(problems)
        super().__init__(f"the recipe has {count} mistake{'s' if count > 1 else ''}")
        self.problems = problems


class PassError(LlmoptError):
    """A pass cannot be applied to this model, or failed while it ran."""

    exit_code = 3


class RejectedError(LlmoptError):
    """A build missed one of its gates, or a rejected build was asked to serve."""

    exit_code = 4


class UnsupportedError(LlmoptError):
    """An architecture, operator, scheme or piece of hardware that llmopt cannot handle."""

    exit_code = 5


class MissingExtraError(UnsupportedError):
    """An optional dependency is not installed; the hint says which extra brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed", hint=f"pip install 'llmopt[{extra}]'")


class VerificationError(LlmoptError):
    """Two executions that must agree do not, or a file is not what the manifest says."""

    exit_code = 6


class ResourceError(LlmoptError):
    """Memory, disk or time ran out; what was finished is kept in the cache, so the build can be run again."""

    exit_code = 7


# Libraries report a failed allocation as an exception with their own words: torch, and oneDNN in it, as a RuntimeError,
# ONNX Runtime as its own kind.
_OUT_OF_MEMORY_WORDS = (
    "can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc", "bad allocation",
    "failed to allocate memory", "can't start new thread", "pthread_create failed", "could not create a primitive",
    "failed to map segment",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says, in Python's or in a library's way, that an allocation failed."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    is_theirs = isinstance(error, RuntimeError | ImportError) or type(error).__module__.startswith(
        ("onnxruntime", "safetensors")
    )
    return is_theirs and any(words in str(error).lower() for words in _OUT_OF_MEMORY_WORDS)
