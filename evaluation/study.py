"""The study of a search on disk, and which values are tried next: Optuna, kept out of everything else."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmopt.optimizer.cache import digest_of, locked
from llmopt.optimizer.errors import InputError, MissingExtraError
from llmopt.optimizer.tuning import Range, Tuning

__all__ = ["Study", "open_study"]

_JOURNAL = "study.log"


@contextmanager
def open_study(
    output: Path, tuning: Tuning, identity: Mapping[str, Any], *, cache: Path, seed: int, force: bool = False
) -> Iterator["Study"]:
    """Open the study in ``output``, or begin one; no other process may have it open.

    Args:
        output: Its directory, made where there is none.
        tuning: What is searched.
        identity: What has to be equal for a study to be continued, as JSON can hold it.
        cache: Where the lock lies.
        seed: Of the sampler.
        force: Remove the study that is there.

    Raises:
        MissingExtraError: optuna is not installed.
        InputError: ``output`` holds something else, another study, or is in use.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise MissingExtraError("optuna", "tune") from error
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if output.exists() and not (output / _JOURNAL).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists and is no study of llmopt tune", hint="name another directory with -o")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with locked(cache / "locks" / digest_of(["tune", str(output.resolve())]), wait=False):
            if force:
                shutil.rmtree(output, ignore_errors=True)
            output.mkdir(parents=True, exist_ok=True)
            storage = JournalStorage(JournalFileBackend(str(output / _JOURNAL)))
            study = optuna.create_study(storage=storage, study_name="tune", load_if_exists=True)
            _check_identity(study, json.dumps(identity, sort_keys=True), output)
            yield Study(study, tuning, seed)
    except BlockingIOError as error:
        raise InputError(
            f"another process tunes into {output}", hint="wait for it, or use another directory"
        ) from error


def _check_identity(study: Any, identity: str, output: Path) -> None:
    found = study.user_attrs.get("identity")
    if found is None:
        study.set_user_attr("identity", identity)
    elif found != identity:
        raise InputError(
            f"{output} holds a study of another recipe or search",
            hint="--force begins anew there, or name another directory with -o",
        )


class Study:
    """What was tried, and what comes next.

    Every combination in turn where the number of trials allows all of them; else Optuna's tree-structured Parzen
    estimator chooses (Bergstra et al. 2011, Algorithms for Hyper-Parameter Optimization).
    """

    def __init__(self, study: Any, tuning: Tuning, seed: int) -> None:
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState

        self._study = study
        self._tuning = tuning
        self._state = TrialState
        self._asked: dict[int, Any] = {}
        # Another seed behind every finished trial: a study that is continued does not draw the same values again.
        study.sampler = TPESampler(seed=(seed + len(self.results())) % 2**32)

    def results(self) -> list[dict[str, Any]]:
        """What ``finish`` was given, in order."""
        return [each.user_attrs["result"] for each in self._study.get_trials() if "result" in each.user_attrs]

    def suggestions(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and values of each trial that is still to be made; ``finish`` each before taking the next."""
        tuning = self._tuning
        is_grid = all(not isinstance(each, Range) for each in tuning.search.values())
        is_grid = is_grid and tuning.combinations <= tuning.trials
        tried = [each["values"] for each in self.results()]
        left = [each for each in tuning.grid() if each not in tried] if is_grid else self._interrupted()
        count = len(left) if is_grid else max(0, tuning.trials - len(tried))
        for index in range(count):
            if index < len(left):
                self._study.enqueue_trial(left[index])
            trial = self._study.ask(self._distributions())
            self._asked[trial.number] = trial
            yield trial.number, {path: trial.params[path] for path in tuning.search}

    def finish(self, number: int, result: Mapping[str, Any], score: float) -> None:
        """Write down what a trial arrived at; a smaller score is a better one."""
        trial = self._asked.pop(number)
        trial.set_user_attr("result", dict(result))
        self._study.tell(trial, score)

    def _interrupted(self) -> list[dict[str, Any]]:
        """The values of trials that a killed process had begun, which end here."""
        begun = self._study.get_trials(states=(self._state.RUNNING,))
        for trial in begun:
            self._study.tell(trial.number, state=self._state.FAIL)
        return [dict(trial.params) for trial in begun if trial.params.keys() == self._tuning.search.keys()]

    def _distributions(self) -> dict[str, Any]:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        found: dict[str, Any] = {}
        for path, values in self._tuning.search.items():
            if not isinstance(values, Range):
                found[path] = CategoricalDistribution(values)
            elif values.is_whole:
                found[path] = IntDistribution(int(values.min), int(values.max), log=values.log)
            else:
                found[path] = FloatDistribution(float(values.min), float(values.max), log=values.log)
        return found
