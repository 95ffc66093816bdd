"""A recipe: what to build, checked as a whole before any work starts.

``Recipe.load`` reads the file, applies ``--set`` and the environment, imports the passes and exporters that are named,
and reports every mistake at once with its line.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt

from llmopt.optimizer.calibration import Calibration
from llmopt.optimizer.contracts import ACTIVATION_BYTES, Exporter, WeightPass
from llmopt.optimizer.errors import InputError, Problem, RecipeError
from llmopt.optimizer.gates import Gate
from llmopt.optimizer.recipe_errors import shown
from llmopt.optimizer.recipe_text import Document, parse
from llmopt.optimizer.tuning import Tuning

if TYPE_CHECKING:
    from llmopt.optimizer.model import Model

__all__ = ["NamedExporter", "NamedPass", "Recipe", "Resources", "Settings"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Resources(_Part):
    """What a build may use of this machine."""

    max_ram_gb: float | None = Field(None, gt=0, description="Memory limit in GB; omitted: all there is.")
    threads: PositiveInt | None = Field(None, description="Threads; omitted: one per core.")

    @property
    def thread_count(self) -> int:
        """``threads``, or the number of cores this process may use."""
        return self.threads or len(os.sched_getaffinity(0))

    @property
    def activation_bytes(self) -> int:
        """See ``PassContext.activation_bytes``: an eighth of the limit at most."""
        limit = math.inf if self.max_ram_gb is None else self.max_ram_gb * 1e9 / 8
        return int(min(ACTIVATION_BYTES, limit))


def _is_exactly_1(value: object) -> object:
    """Also refuses ``true`` and ``1.0``, which Python holds equal to 1."""
    if value != 1 or not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"must be 1, not {shown(value)}; this llmopt reads version 1 of the recipe format")
    return value


class Settings(_Part):
    """Everything in a recipe but its passes and exporters."""

    version: Annotated[Literal[1], BeforeValidator(_is_exactly_1)] = Field(description="Of the recipe format: 1.")
    model: str = Field(
        min_length=1,
        description="A directory, a .gguf file, a hub id as ORG/NAME@REVISION, or pypi:NAME==VERSION/path/in/wheel.",
    )
    calibration: Calibration | None = Field(
        None, description="Text for passes that look at some; round_to_nearest does not."
    )
    accept: tuple[Gate, ...] = Field((), description="Gates: a build that misses one is rejected.")
    verify: Literal["none", "quick", "full"] = Field(
        "quick",
        description="How thoroughly weight passes that keep the function, and the lowered graph, are checked against "
        "what was before them, layer by layer.",
    )
    strict: bool = Field(False, description="Whether a fallback is an error instead of a note.")
    resources: Resources = Field(default_factory=Resources, description="Limits on memory and threads.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="The only source of randomness.")
    tune: Tuning | None = Field(None, description="What llmopt tune searches; builds leave it aside.")


@dataclass(frozen=True, slots=True)
class NamedPass:
    """A weight pass and the name it has in the recipe."""

    name: str
    instance: WeightPass


@dataclass(frozen=True, slots=True)
class NamedExporter:
    """An exporter and the name it has in the recipe."""

    name: str
    instance: Exporter


class Recipe(Settings):
    """A recipe in which everything is resolved: pass and exporter objects instead of names."""

    passes: tuple[NamedPass, ...]
    export: tuple[NamedExporter, ...]
    base: Path = Field(description="The recipe's directory, which paths in it are relative to.")

    @staticmethod
    def load(path: Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read and check a recipe.

        Args:
            path: The file.
            overrides: Of ``--set``, each as ``passes.0.round_to_nearest.group_size=64``.

        Raises:
            InputError: There is no such file, or it cannot be read.
            RecipeError: With every mistake found.
        """
        from llmopt.optimizer.recipe_check import checked

        document = _changed(path, overrides)
        if document.data is not None or not document.problems:
            recipe = checked(document, path.parent)
            if recipe is not None:
                return recipe
        raise RecipeError(sorted(set(document.problems), key=_order))

    @staticmethod
    def written(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """A recipe that loads as plain data: what the file says, with ``--set`` and the environment applied."""
        data: dict[str, Any] = _changed(path, overrides).data
        return data

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """The JSON schema of recipe files, with every pass and exporter that is installed."""
        from llmopt.optimizer.recipe_schema import json_schema

        return json_schema()

    @property
    def needs_calibration(self) -> bool:
        """Whether any pass looks at text."""
        return any(step.instance.needs_calibration for step in self.passes)

    def yardstick(self, source: "Model") -> "Model":
        """What builds of it are measured against and texts are sampled from: the source model, with its adapters."""
        for step in self.passes:
            source = step.instance.yardstick(source, self.seed)
        return source

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default filled in, as plain data that is equal for equal recipes.

        Paths are as written, so it does not say where the recipe was; it is itself a recipe. ``tune`` is left out.
        """
        plain = self.model_dump(mode="json", exclude={"passes", "export", "base", "tune"}, exclude_none=True)
        plain["passes"] = [_named(each.name, each.instance) for each in self.passes]
        plain["export"] = [_named(each.name, each.instance) for each in self.export]
        return plain


def _named(name: str, options: BaseModel) -> dict[str, Any]:
    return {name: options.model_dump(mode="json", exclude_none=True)}


def _order(problem: Problem) -> tuple[bool, int, str, str]:
    return problem.file == "--set", problem.line, problem.path, problem.what


def _changed(path: Path, overrides: Sequence[str]) -> Document:
    """The text of a recipe with ``--set`` and the environment applied, if it can be read at all."""
    from llmopt.optimizer.recipe_edit import override, substitute

    document = _read(path)
    if document.data is not None or not document.problems:
        override(document, overrides)
        substitute(document, os.environ)
    return document


def _read(path: Path) -> Document:
    """The text of a recipe as a document.

    Raises:
        InputError: There is no such file, or it cannot be read.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"there is no recipe {path}", hint="llmopt init MODEL writes one") from error
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror}") from error
    try:
        return parse(raw.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problem = Problem(str(path), line, "", "is not UTF-8 text", "save it as UTF-8")
        raise RecipeError([problem]) from error
