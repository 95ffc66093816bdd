"""A search over a recipe's options: one build for each trial, kept in a study that a later run continues."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llmopt.evaluation.speed import Plan, measure_speed
from llmopt.evaluation.study import Study, open_study
from llmopt.optimizer.build import build
from llmopt.optimizer.errors import InputError, LlmoptError, Problem, RecipeError, ResourceError
from llmopt.optimizer.manifest import GateResult, Manifest
from llmopt.optimizer.progress import Progress
from llmopt.optimizer.recipe import Recipe
from llmopt.optimizer.tokens import SAMPLED
from llmopt.optimizer.tuning import Range, Tuning

__all__ = ["Search", "Trial", "best_of", "check_search", "nearest_of", "ranked", "tune", "undominated"]

_PAST = 64
_STEPS = 32


@dataclass(frozen=True, slots=True)
class Trial:
    """One build and what became of it.

    Attributes:
        number: Its build is ``trials/NUMBER`` in the output directory.
        values: Option path -> value.
        status: accepted; rejected, when it misses a gate or is too large; failed, when it could not be built.
        bytes: Of the engine.
        kl: Nats per token, on the constraint's text; else on the first that was measured.
        tokens_per_second: Of one sequence that is decoded.
        excess: By how much it misses its limits, as the sum of shares of them; 0 for none.
        message: Which gates it missed, or why it failed.
    """

    number: int
    values: dict[str, Any]
    status: Literal["accepted", "rejected", "failed"]
    bytes: int = 0
    kl: float = 0.0
    tokens_per_second: float = 0.0
    excess: float = 0.0
    message: str = ""

    @property
    def is_built(self) -> bool:
        """Whether there was a build, which may have been removed since."""
        return self.status != "failed"


@dataclass(frozen=True, slots=True)
class Search:
    """What is tuned, and where.

    Attributes:
        recipe: The file.
        overrides: Of ``--set``.
        tuning: The search.
        output: Directory of the study, its builds and its report.
        cache: Where finished passes and downloads are kept.
        keep: Whether the builds of trials that others dominate are kept.
        force: Whether a study that is there is removed.
        offline: Whether hubs are left alone.
    """

    recipe: Path
    overrides: tuple[str, ...]
    tuning: Tuning
    output: Path
    cache: Path
    keep: bool = False
    force: bool = False
    offline: bool = False

    def sets(self, values: Mapping[str, Any]) -> list[str]:
        """What ``--set`` would be given for the recipe with these values."""
        return [*self.overrides, *(f"{path}={json.dumps(value)}" for path, value in values.items())]


def check_search(search: Search) -> None:
    """Have every option that is searched checked as ``--set`` would be.

    Raises:
        RecipeError: An option takes none of the values it is to be given, with no value of any other option, such as
            one that does not exist.
    """
    problems: list[Problem] = []
    for path, values in search.tuning.search.items():
        tried = [{path: each} for each in _values(values)]
        found = [_problems(search, each) for each in tried]
        if not all(found):
            continue
        # An option may need another one, as group_size needs a scheme with groups.
        others = [{name: each} for name, its in search.tuning.search.items() if name != path for each in _values(its)]
        if all(_problems(search, each | other) for each in tried for other in others):
            problems += [Problem("tune.search", 1, each.path, each.what, each.hint) for each in found[0]]
    if problems:
        raise RecipeError(problems)


def _values(values: tuple[Any, ...] | Range) -> tuple[Any, ...]:
    return (values.min, values.max) if isinstance(values, Range) else values


def _problems(search: Search, values: Mapping[str, Any]) -> list[Problem]:
    try:
        Recipe.load(search.recipe, search.sets(values))
    except RecipeError as error:
        return error.problems
    return []


def tune(search: Search, progress: Progress) -> list[Trial]:
    """Build trials until there are as many as wanted, those of an earlier run with the same search included.

    Args:
        search: Checked already.
        progress: Where steps are shown.

    Returns:
        All trials in order.

    Raises:
        MissingExtraError: optuna is not installed.
        InputError: The output directory holds something else, or the study of another search; or the recipe makes no
            engine.
        ResourceError: Memory, disk or time ran out; a later run continues.
    """
    recipe = Recipe.load(search.recipe, search.overrides)
    if not any(target.name == "cpu" for item in recipe.export for target in item.instance.executors()):
        raise InputError(
            f"{search.recipe} exports no engine for the CPU, and a search measures the size and speed of one",
            hint="add onnx to its export",
        )
    identity = {
        "recipe": Recipe.written(search.recipe, search.overrides) | {"tune": None},
        "tune": search.tuning.model_dump(mode="json", exclude={"trials"}),
    }
    with open_study(
        search.output, search.tuning, identity, cache=search.cache, seed=recipe.seed, force=search.force
    ) as study:
        for number, values in study.suggestions():
            known = next((each for each in _trials(study) if each.values == values), None)
            if known is None:
                with progress.step(f"trial {number}"):
                    trial = _tried(search, number, values, progress)
            else:
                trial = Trial(**{**asdict(known), "number": number})
                progress.note(f"trial {number} is trial {known.number} again")
            study.finish(number, asdict(trial), _score(trial, search.tuning))
            _tell(trial, progress)
            if not search.keep:
                _remove_dominated(search, _trials(study))
        return _trials(study)


def _trials(study: Study) -> list[Trial]:
    return [Trial(**each) for each in study.results()]


def _tried(search: Search, number: int, values: dict[str, Any], progress: Progress) -> Trial:
    """Build and measure one trial."""
    directory = search.output / "trials" / str(number)
    shutil.rmtree(directory, ignore_errors=True)
    try:
        recipe = Recipe.load(search.recipe, search.sets(values))
        constraint = search.tuning.constraint
        if constraint is not None and constraint not in recipe.accept:
            recipe = recipe.model_copy(update={"accept": (*recipe.accept, constraint)})
        manifest = build(recipe, directory, cache=search.cache, progress=progress, offline=search.offline)
        with progress.step("speed"):
            speed = _speed(directory, manifest, recipe.resources.thread_count)
    except ResourceError:
        raise
    except LlmoptError as error:
        problems = error.problems if isinstance(error, RecipeError) else [error.message]
        return Trial(number, values, "failed", message="; ".join(map(str, problems)))
    return _judged(number, values, manifest, speed, search.tuning)


def _speed(directory: Path, manifest: Manifest, threads: int) -> float:
    """Tokens a second of one sequence."""
    capacity = manifest.engines[0].capacity
    steps = min(_STEPS, capacity // 2)
    past = min(_PAST, capacity - steps)
    return (
        measure_speed(directory, Plan(prompts=(), batches=(1,), past=past, steps=steps, threads=threads)).rates[0].rate
    )


def _judged(number: int, values: dict[str, Any], manifest: Manifest, speed: float, tuning: Tuning) -> Trial:
    size = manifest.bytes_of(manifest.engines[0])
    data = SAMPLED if tuning.constraint is None or tuning.constraint.data is None else str(tuning.constraint.data)
    divergences = {found.data: found.value for found in reversed(manifest.measurements) if found.metric == "kl"}
    kl = divergences.get(data, next(iter(divergences.values())))
    missed = [result for result in manifest.verdict.gates if not result.passed]
    excess = sum(_excess(result, manifest) for result in missed)
    reasons = [f"{result.gate['metric']} {result.value:.4g}" for result in missed]
    if tuning.max_megabytes is not None and size > tuning.max_megabytes * 1e6:
        excess += size / (tuning.max_megabytes * 1e6) - 1
        reasons.append(f"{size / 1e6:.1f} MB")
    status: Literal["accepted", "rejected"] = "rejected" if reasons else "accepted"
    return Trial(number, values, status, size, kl, speed, excess, ", ".join(reasons))


def _excess(result: GateResult, manifest: Manifest) -> float:
    """By which share of its limit a value misses a gate."""
    gate, value = result.gate, result.value
    if not math.isfinite(value):
        return 1e6
    if "min" in gate:
        return float(gate["min"] - value) / max(float(gate["min"]), 1e-9)
    limit = gate.get("max")
    if limit is None:
        same = (found for found in manifest.measurements if (found.metric, found.value) == (gate["metric"], value))
        limit = next(found.source or value for found in same) * (1 + gate["max_increase"])
    return float(value - limit) / max(float(limit), 1e-9)


def _score(trial: Trial, tuning: Tuning) -> float:
    """What the sampler makes small: the objective, or behind all of those how far a build is from its limits."""
    if trial.status == "failed":
        return 1e15
    if trial.status == "rejected":
        return 1e12 * (1 + min(trial.excess, 100))
    return objective(trial, tuning)


def objective(trial: Trial, tuning: Tuning) -> float:
    """The smaller, the better."""
    return {"size": float(trial.bytes), "speed": -trial.tokens_per_second, "kl": trial.kl}[tuning.objective]


def best_of(trials: Sequence[Trial], tuning: Tuning) -> Trial | None:
    """The accepted trial that is best; of equally good ones the first with the smallest divergence."""
    first = next(iter(ranked(trials, tuning)), None)
    return first if first is not None and first.status == "accepted" else None


def ranked(trials: Sequence[Trial], tuning: Tuning) -> list[Trial]:
    """The best one first; what is not accepted comes behind, by how far it is from its limits."""
    return sorted(trials, key=lambda each: (_score(each, tuning), each.kl, each.number))


def nearest_of(trials: Sequence[Trial]) -> Trial | None:
    """The build that misses its limits by least."""
    return min((each for each in trials if each.is_built), key=lambda each: (each.excess, each.number), default=None)


def undominated(trials: Sequence[Trial], tuning: Tuning) -> list[Trial]:
    """The accepted trials no other one of which is as good in size and loss, and in speed if that is the objective."""

    def facts(trial: Trial) -> tuple[float, ...]:
        speed = (-trial.tokens_per_second,) if tuning.objective == "speed" else ()
        return (trial.bytes, trial.kl, *speed)

    accepted = [each for each in trials if each.status == "accepted"]
    return [
        each
        for each in accepted
        if not any(
            all(a <= b for a, b in zip(facts(other), facts(each), strict=True))
            and (facts(other) != facts(each) or other.number < each.number)
            for other in accepted
            if other is not each
        )
    ]


def _remove_dominated(search: Search, trials: Sequence[Trial]) -> None:
    """Leave the builds worth having; until one is accepted, the nearest."""
    nearest = nearest_of(trials)
    kept = undominated(trials, search.tuning) or ([nearest] if nearest else [])
    numbers = {str(each.number) for each in kept}
    for directory in (search.output / "trials").glob("*"):
        if directory.name not in numbers:
            shutil.rmtree(directory)


def _tell(trial: Trial, progress: Progress) -> None:
    values = ", ".join(f"{path} {value}" for path, value in trial.values.items())
    if trial.is_built:
        facts = f"{trial.bytes / 1e6:.1f} MB, KL {trial.kl:.4g}, {trial.tokens_per_second:.0f} tokens/s"
        message = f"{facts}, {trial.status}" + (f" ({trial.message})" if trial.message else "")
    else:
        message = f"failed: {trial.message}"
    progress.note(f"trial {trial.number}: {values}: {message}")
