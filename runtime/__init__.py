"""Serves a build directory; needs no torch and none of the compiler."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmopt.runtime.llm import LLM, Answer, Options

__all__ = ["LLM", "Answer", "Options"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: modules below this one are used without all of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llmopt.runtime import llm

    return getattr(llm, name)
