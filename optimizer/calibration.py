"""The ``calibration:`` of a recipe: which text the passes look at, and how it is cut."""

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

__all__ = ["SUFFIXES", "Calibration", "Form", "form_of", "is_dataset"]

Form = Literal["text", "jsonl", "parquet"]

_DATASET = re.compile(r"[\w.-]+/[\w.-]+@[\w./-]+")

SUFFIXES: dict[Form, tuple[str, ...]] = {
    "text": (".txt", ".text", ".md", ".tokens", ".raw", ""),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
}
"""What a file of calibration text is, by the end of its name."""


class Calibration(BaseModel):
    """The text that passes look at."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    source: str | None = Field(
        None,
        min_length=1,
        description="A text, .jsonl or .parquet file, relative to the recipe, or a data set of the hub as "
        "ORG/NAME@COMMIT; omitted: text sampled from the model.",
    )
    format: Form | None = Field(None, description="What kind of file the source is; omitted: what its suffix says.")
    field: str = Field(
        "text", min_length=1, description="The field of each line or row: text, or chat messages for the template."
    )
    split: str | None = Field(
        None, min_length=1, description="The split of a data set, of which the first file is read; omitted: train."
    )
    file: str | None = Field(None, min_length=1, description="The file of a data set, instead of a split.")
    samples: PositiveInt = Field(128, description="How many windows of text.")
    tokens: PositiveInt = Field(
        1024, ge=2, description="Tokens per window; omitted: 1024, or the model's context where that is shorter."
    )
    packing: Literal["concat", "pad"] = Field(
        "concat",
        description="concat: documents joined with the end-of-text token and cut into windows; pad: one document a "
        "window, cut or padded.",
    )
    seed: int | None = Field(
        None, ge=0, le=2**32 - 1, description="Which windows are drawn, or sampled; omitted: the recipe's seed."
    )

    @property
    def is_dataset(self) -> bool:
        """Whether the source is written as a data set of the hub. A file of that name counts more."""
        return self.source is not None and is_dataset(self.source)

    @model_validator(mode="after")
    def _parts_fit(self) -> "Calibration":
        if self.source is None and (given := self.model_fields_set & {"format", "field", "split", "file", "packing"}):
            raise ValueError(f"{min(given)} is about a source, and none is given")
        if (self.split or self.file) and not self.is_dataset:
            raise ValueError("split and file are for a data set of the hub, written ORG/NAME@COMMIT")
        if self.split and self.file:
            raise ValueError("split and file name the same thing; give one of them")
        name = self.file if self.is_dataset else self.source
        if name is not None and self.format is None:
            form_of(name)
        return self


def is_dataset(source: str) -> bool:
    """Whether ``source`` is written ``org/name@commit``."""
    return _DATASET.fullmatch(source) is not None


def form_of(name: str) -> Form:
    """What kind of file ``name`` is by its suffix.

    Raises:
        ValueError: The suffix does not say.
    """
    suffix = Path(name).suffix.lower()
    for form, suffixes in SUFFIXES.items():
        if suffix in suffixes:
            return form
    known = ", ".join(each for suffixes in SUFFIXES.values() for each in suffixes if each)
    raise ValueError(f"what {name} holds cannot be told from its suffix; set format: text, jsonl or parquet ({known})")
