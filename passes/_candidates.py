"""The options of ``auto_bits`` that name schemes, and the pass that rounds to them."""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, RootModel, model_validator

from llmopt.optimizer import loader
from llmopt.optimizer.assignment import GroupSize, Kept, SchemeQuantPass
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.recipe_errors import validated
from llmopt.optimizer.recipe_text import Document, Place
from llmopt.optimizer.scheme import Scheme, SchemeOption

__all__ = ["Candidate", "Method"]

_OURS = ("scheme", "group_size", "head", "experts", "overrides")
"""Options of a quantizer that ``auto_bits`` decides about."""


class Candidate(BaseModel):
    """A scheme that modules may get, or none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheme: SchemeOption | Kept = Field(
        description="A preset's name, or weights and input_activations spelled out; none leaves modules in float."
    )
    group_size: GroupSize | None = Field(None, description="Input columns per scale; -1: one scale per output channel.")

    @property
    def sized(self) -> Scheme | None:
        """With the group size; None leaves modules in float."""
        if self.scheme == "none":
            return None
        return self.scheme if self.group_size is None else self.scheme.with_group_size(self.group_size)

    @property
    def suits_experts(self) -> bool:
        """Whether it leaves inputs in float: experts have no kernels that round them."""
        return self.scheme == "none" or self.scheme.input_activations is None

    @model_validator(mode="after")
    def _group_size_fits(self) -> "Candidate":
        if self.scheme == "none":
            if self.group_size is not None:
                raise ValueError("group_size does not go with none, which leaves modules in float")
        elif self.scheme.input_activations is not None and self.group_size not in (None, -1):
            raise ValueError("group_size does not go with quantized activations")
        return self


class Method(RootModel[dict[str, dict[str, Any]]]):
    """The pass that quantizes: its name, and its options without those about schemes."""

    model_config = ConfigDict(frozen=True)

    def __hash__(self) -> int:
        return hash(json.dumps(self.root, sort_keys=True))

    @model_validator(mode="after")
    def _can_be_made(self) -> "Method":
        if len(self.root) != 1:
            raise ValueError("method names one quantizing pass, as in gptq: {}")
        (name, options), kind = next(iter(self.root.items())), self._kind()
        for option in options:
            if option in _OURS:
                raise ValueError(f"{name}.{option} is chosen by auto_bits; head and overrides stand beside method")
        document = Document({}, {(): Place("", 0)})
        if validated(kind, {"scheme": "W8A16", **options}, document, ()) is None:
            found = document.problems[0]
            raise ValueError(f"{name}.{found.path}: {found.what}" + (f"; {found.hint}" if found.hint else ""))
        return self

    def made(self, **options: Any) -> SchemeQuantPass:
        """The pass with options about schemes."""
        (own,) = self.root.values()
        made: SchemeQuantPass = self._kind()(**own, **options)
        return made

    def _kind(self) -> type[SchemeQuantPass]:
        (name,) = self.root
        try:
            kind = loader.load("passes", name)
        except InputError as error:
            raise ValueError(f"{error.message}; {error.hint}") from error
        if not issubclass(kind, SchemeQuantPass):
            raise ValueError(f"{name} is no pass that quantizes by schemes; methods are such as gptq")  # noqa: TRY004
        return kind
