"""The ``tune:`` of a recipe: which of its options ``llmopt tune`` searches, for what, and within which limits."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from llmopt.optimizer.errors import InputError, Problem, RecipeError
from llmopt.optimizer.gates import Gate
from llmopt.optimizer.recipe_errors import validated
from llmopt.optimizer.recipe_text import Document, Place, parse

__all__ = ["Objective", "Range", "Tuning", "tuning_of"]

_SEARCH = "--search"

Objective = Literal["size", "speed", "kl"]

Value = bool | int | float | str


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Range(_Part):
    """Numbers between two bounds; whole ones where both bounds are."""

    min: int | float = Field(description="The smallest value.")
    max: int | float = Field(description="The largest value.")
    log: bool = Field(False, description="Whether small values are tried as often as large ones, by their logarithm.")

    @model_validator(mode="after")
    def _bounds_fit(self) -> "Range":
        if not self.min < self.max:
            raise ValueError(f"min {self.min:g} is not below max {self.max:g}")
        if self.log and self.min <= 0:
            raise ValueError("log goes with a min above 0")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether it holds whole numbers."""
        return isinstance(self.min, int) and isinstance(self.max, int)


class Tuning(_Part):
    """A search over options of the recipe."""

    search: dict[str, tuple[Value, ...] | Range] = Field(
        {},
        description="Option path, as --set takes it -> the values to try as a list, or min and max.",
    )
    objective: Objective = Field(
        "size",
        description="What is made best: size, the smallest engine; speed, the most tokens a second when one sequence "
        "is decoded; kl, the smallest divergence from the source model.",
    )
    constraint: Gate | None = Field(
        None, description="The accuracy that the best build has to have, written like a gate of accept."
    )
    max_megabytes: float | None = Field(None, gt=0, description="Largest accepted engine, in MB.")
    trials: PositiveInt = Field(20, description="Builds to try, those of an earlier run included.")

    @model_validator(mode="after")
    def _lists_have_values(self) -> "Tuning":
        for path, values in self.search.items():
            if isinstance(values, tuple) and not values:
                raise ValueError(f"{path} has no values to try; give at least one")
            if isinstance(values, tuple) and len({(type(each), each) for each in values}) < len(values):
                raise ValueError(f"{path} has a value twice")
        return self

    @property
    def combinations(self) -> float:
        """How many different builds there are; infinite with a range of fractions."""
        sizes = [self._size(each) for each in self.search.values()]
        return math.prod(sizes)

    def grid(self) -> Iterator[dict[str, Any]]:
        """All of them, where every option has a list of values."""
        lists = [values for values in self.search.values() if isinstance(values, tuple)]
        for values in itertools.product(*lists):
            yield dict(zip(self.search, values, strict=True))

    @staticmethod
    def _size(values: tuple[Value, ...] | Range) -> float:
        if isinstance(values, tuple):
            return len(values)
        return values.max - values.min + 1 if values.is_whole else math.inf


def tuning_of(
    written: Tuning | None, *, search: Sequence[str] = (), trials: int | None = None, objective: str | None = None
) -> Tuning:
    """A recipe's ``tune`` with what the command line says instead.

    Args:
        written: In the recipe.
        search: Of ``--search``, each as ``passes.0.gptq.damping=0.01,0.1`` or ``...={min: 0.01, max: 0.1}``.
        trials: Instead of the recipe's.
        objective: Instead of the recipe's.

    Raises:
        InputError: Nothing is searched.
        RecipeError: With every mistake in ``search``.
    """
    plain = {} if written is None else written.model_dump(mode="json", exclude_none=True)
    given = {"trials": trials, "objective": objective}
    plain |= {name: value for name, value in given.items() if value is not None}
    problems: list[Problem] = []
    plain["search"] = {**plain.get("search", {}), **_searched(search, problems)}
    document = Document(plain, {(): Place(_SEARCH, 1)}, problems=problems)
    tuning = None if problems else validated(Tuning, plain, document, ("tune",))
    if tuning is None:
        raise RecipeError(document.problems)
    if not tuning.search:
        hint = "as in --search passes.0.gptq.damping=0.01,0.1, or below tune.search in the recipe"
        raise InputError("no option is searched", hint=hint)
    return tuning


def _searched(assignments: Sequence[str], problems: list[Problem]) -> dict[str, Any]:
    """Option path -> values, as YAML; mistakes go to ``problems``."""
    found: dict[str, Any] = {}
    for number, assignment in enumerate(assignments, start=1):
        path, _, values = (part.strip() for part in assignment.partition("="))
        if not path or not values:
            what, hint = f"{assignment!r} is not PATH=VALUES", "as in passes.0.gptq.damping=0.01,0.1"
            problems.append(Problem(_SEARCH, number, "", what, hint))
            continue
        parsed = parse(values if values[0] in "[{" else f"[{values}]", _SEARCH, line=number)
        problems += [Problem(_SEARCH, number, path, each.what, each.hint) for each in parsed.problems]
        found[path] = parsed.data
    return found
