"""The report of a search, as a page that loads nothing: size, speed and loss of its trials."""

import math
from collections.abc import Mapping, Sequence

from llmopt.evaluation.pages import megabytes, nats, rendered
from llmopt.evaluation.scatter import Mark, Scatter, axis_of, scatter
from llmopt.evaluation.tuning import Search, Trial, best_of, ranked, undominated
from llmopt.optimizer.tuning import Tuning

__all__ = ["tuning_page"]

_COLOURS = {"best": "c4", "worth having": "c0", "accepted": "c8", "rejected": "c2"}
_OBJECTIVES = {"size": "the smallest engine", "speed": "the fastest engine", "kl": "the smallest divergence"}


def tuning_page(search: Search, trials: Sequence[Trial]) -> str:
    """Plots of loss against size and speed, and a table with every trial."""
    tuning = search.tuning
    best = best_of(trials, tuning)
    kinds = _kinds(trials, tuning)
    drawn = [each for each in trials if each.is_built and math.isfinite(each.kl)]
    return rendered(
        "tuning.html",
        {
            "title": f"Search of {search.recipe.stem}",
            "name": search.recipe.name,
            "aim": _OBJECTIVES[tuning.objective],
            "constraint": _limits(tuning),
            "best": best,
            "trials": ranked(trials, tuning),
            "options": list(tuning.search),
            "kinds": kinds,
            "colours": _COLOURS,
            "plots": _plots(drawn, kinds, tuning) if drawn else [],
        },
    )


def _kinds(trials: Sequence[Trial], tuning: Tuning) -> dict[int, str]:
    """Number of a trial -> its colour's name; failed ones have none."""
    best = best_of(trials, tuning)
    kinds = {each.number: each.status for each in trials if each.is_built}
    worth = {each.number: "worth having" for each in undominated(trials, tuning)}
    return {**kinds, **worth, **({} if best is None else {best.number: "best"})}


def _plots(trials: Sequence[Trial], kinds: Mapping[int, str], tuning: Tuning) -> list[Scatter]:
    gate = tuning.constraint
    limit = gate.max if gate is not None and gate.metric == "kl" else None
    loss = [each.kl for each in trials]
    y = axis_of([*loss, *([limit] if limit and limit <= 3 * max(loss) else [])], "KL, nats per token", _plain)
    size = axis_of([each.bytes / 1e6 for each in trials], "size, MB", _plain)
    speed = axis_of([each.tokens_per_second for each in trials], "tokens/s, one sequence", _plain)
    marks = [_mark(each, kinds[each.number]) for each in trials]
    each_size = [(each.bytes / 1e6, each.kl, mark) for each, mark in zip(trials, marks, strict=True)]
    each_speed = [(each.tokens_per_second, each.kl, mark) for each, mark in zip(trials, marks, strict=True)]
    return [scatter(size, y, each_size, limit=limit), scatter(speed, y, each_speed, limit=limit)]


def _mark(trial: Trial, kind: str) -> Mark:
    measured = f"{megabytes(trial.bytes)}, KL {nats(trial.kl)}, {trial.tokens_per_second:.0f} tokens/s"
    return Mark(_COLOURS[kind], str(trial.number), f"trial {trial.number}: {measured}")


def _plain(value: float) -> str:
    return f"{value:.4g}"


def _limits(tuning: Tuning) -> str:
    """What a trial has to meet beside the recipe's own gates; empty where that is nothing."""
    found = []
    if (gate := tuning.constraint) is not None:
        names = {"max": "at most", "min": "at least", "max_increase": "increased by at most"}
        limit = next(
            f"{words} {getattr(gate, name):g}" for name, words in names.items() if getattr(gate, name) is not None
        )
        found.append(f"{gate.metric} {limit}" + (f" on {gate.data}" if gate.data else " on sampled text"))
    if tuning.max_megabytes is not None:
        found.append(f"at most {megabytes(tuning.max_megabytes * 1e6)}")
    return ", ".join(found)
