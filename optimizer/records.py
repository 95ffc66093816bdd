"""Collects what a pass says while it runs, and makes its record."""

from dataclasses import dataclass, field
from typing import Any

from llmopt.optimizer.errors import PassError
from llmopt.optimizer.manifest import PassRecord

__all__ = ["Recorder", "refused_fallback"]


@dataclass(slots=True)
class Recorder:
    """The receiving end of a ``PassContext``.

    Attributes:
        name: The pass.
        options: As resolved.
        strict: Whether a fallback is an error.
    """

    name: str
    options: dict[str, Any]
    strict: bool = False
    notes: list[str] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """See ``PassContext.note``."""
        self.notes.append(text)

    def fallback(self, text: str) -> None:
        """See ``PassContext.fallback``.

        Raises:
            PassError: Under ``strict``.
        """
        if self.strict:
            raise refused_fallback(self.name, text)
        self.fallbacks.append(text)

    def detail(self, name: str, value: Any) -> None:
        """See ``PassContext.detail``."""
        self.details[name] = value

    def record(self, *, changed: bool) -> PassRecord:
        """The manifest's entry."""
        return PassRecord(
            name=self.name,
            options=self.options,
            changed=changed,
            notes=self.notes,
            fallbacks=self.fallbacks,
            details=self.details,
        )


def refused_fallback(name: str, text: str) -> PassError:
    """What ``strict: true`` makes of the fallback ``text`` of the pass ``name``."""
    return PassError(f"{name}: {text}", hint="the recipe says strict: true; without it this is a note")
