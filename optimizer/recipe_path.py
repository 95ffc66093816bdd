"""Paths in the options of a pass: kept as they are written, and known as files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import PlainSerializer, PlainValidator, ValidationInfo, WithJsonSchema

__all__ = ["Located", "RecipePath"]


@dataclass(frozen=True, slots=True)
class Located:
    """A path as a recipe writes it, and what it stands for.

    Attributes:
        text: As written. Manifests hold this, so that they do not say where the recipe was.
        place: Relative to the recipe's directory; to the working directory where there is no recipe.
    """

    text: str
    place: Path


def _located(value: object, info: ValidationInfo) -> Located:
    if isinstance(value, Located):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError(f"must be a path, not {value!r}")
    base: Path = (info.context or {}).get("base", Path())
    place = base / Path(value).expanduser()
    if not place.exists():
        raise ValueError(f"there is no {value}; paths are relative to {base.resolve()}")
    return Located(value, place)


RecipePath = Annotated[
    Located,
    PlainValidator(_located),
    PlainSerializer(lambda located: located.text, return_type=str),
    WithJsonSchema({"type": "string", "minLength": 1}),
]
"""The type of an option that names something on disk, which must be there."""
