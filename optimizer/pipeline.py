"""Runs weight passes in order, each from the cache when it has run on the same input before."""

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError

from llmopt.optimizer.basis_file import read_bases, save_bases
from llmopt.optimizer.cache import digest_of, locked, publish, sources_digest
from llmopt.optimizer.contracts import CalibrationText, PassContext
from llmopt.optimizer.digests import file_digests
from llmopt.optimizer.errors import LlmoptError, PassError, is_out_of_memory
from llmopt.optimizer.manifest import PassRecord, sha256_of
from llmopt.optimizer.model import Model
from llmopt.optimizer.progress import Progress, Tick
from llmopt.optimizer.recipe import NamedPass, Recipe
from llmopt.optimizer.records import Recorder, refused_fallback
from llmopt.optimizer.weight_store import WeightStore, read_weights

__all__ = ["Verifier", "each_pass", "run_passes"]

_RECORD = "record.json"
_BASES = "bases.safetensors"

Verifier = Callable[..., Mapping[str, float]]
"""``calibration.same_function.verify_same_function``, which is out of this folder's reach."""


def run_passes(
    model: Model,
    recipe: Recipe,
    *,
    cache: Path,
    progress: Progress,
    verifier: Verifier,
    calibration: CalibrationText | None = None,
) -> tuple[Model, list[PassRecord]]:
    """Apply the recipe's passes; see ``each_pass``.

    Returns:
        The model, its changed weights memory-mapped from the cache, and a record per pass.

    Raises:
        PassError: A pass refuses the model, fails, or falls back under ``strict``.
        VerificationError: A pass that must keep the function does not.
    """
    records: list[PassRecord] = []
    steps = each_pass(model, recipe, cache=cache, progress=progress, verifier=verifier, calibration=calibration)
    for behind, record in steps:
        model = behind
        records.append(record)
    return model, records


def each_pass(
    model: Model,
    recipe: Recipe,
    *,
    cache: Path,
    progress: Progress,
    verifier: Verifier,
    calibration: CalibrationText | None = None,
) -> Iterator[tuple[Model, PassRecord]]:
    """Apply the recipe's passes one by one, each when the next item is asked for.

    A result is kept under the digest of everything that determines it: the input, the pass, its file and its options,
    the seed, how it is verified, llmopt's own sources, threads and CPU features, and for passes that look at text that
    text. So a changed option runs again from there on, and a build that was killed continues behind the last finished
    pass, or behind what that pass left in its work directory.

    Args:
        model: The source model.
        recipe: Whose passes run.
        cache: Where results are kept.
        progress: Where steps are shown.
        verifier: Compares the models before and after a pass that keeps the function.
        calibration: The text for passes that need some; None where no pass does.

    Yields:
        The model behind each pass, its changed weights memory-mapped from the cache, and the pass's record.

    Raises:
        PassError: A pass refuses the model, fails, or falls back under ``strict``.
        VerificationError: A pass that must keep the function does not; nothing of its result is kept.
    """
    digest = model.source.digest
    for step in recipe.passes:
        step.instance.requires(model)
        text = [_text_digest(step, calibration)] if step.instance.needs_calibration else []
        entering = [digest, *text, *_surroundings()]
        digest = digest_of([digest, *_identity(step, cache), *text, recipe.seed, recipe.verify, *_surroundings()])
        directory = cache / "passes" / digest
        with progress.step(step.name) as tick, locked(directory):
            if not _is_finished(directory):
                with _work(directory) as work, publish(directory) as partial:
                    if any(work.iterdir()):
                        progress.note(f"{step.name}: goes on from what a build that was interrupted had finished")
                    context = replace(_context(step, work, tick, calibration), shared=_Shared(cache, entering))
                    _run(step, model, partial, recipe, context, verifier)
            shutil.rmtree(_work_of(directory), ignore_errors=True)
            model, record = _read_result(model, directory), _read_record(directory)
        if recipe.strict and record.fallbacks:
            raise refused_fallback(record.name, record.fallbacks[0])
        _tell(record, progress)
        yield model, record


@dataclass(frozen=True, slots=True)
class _Shared:
    """Where passes on one input and text keep what does not depend on their options; see ``PassContext.shared``."""

    cache: Path
    entering: Sequence[object]

    def __call__(self, *what: object) -> Path:
        return self.cache / "shared" / digest_of([*self.entering, *what])


def _text_digest(step: NamedPass, calibration: CalibrationText | None) -> str:
    """What a pass that looks at text depends on besides its options.

    Raises:
        PassError: There is no text.
    """
    if calibration is None:
        raise PassError(f"{step.name} looks at calibration text, and there is none")
    return calibration.digest


def _context(step: NamedPass, work: Path, tick: Tick, calibration: CalibrationText | None) -> PassContext:
    """What a pass is handed, but for what its recipe and its record add."""
    context = PassContext(progress=tick, work=work)
    if calibration is None or not step.instance.needs_calibration:
        return context
    return replace(context, calibration=calibration.tokens)


def _work_of(directory: Path) -> Path:
    """The work directory of the pass whose result becomes ``directory``."""
    return directory.with_name(f"{directory.name}.work")


@contextmanager
def _work(directory: Path) -> Iterator[Path]:
    """Yield a work directory that outlives an exception and the end of the process, unless it is empty."""
    work = _work_of(directory)
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield work
    except BaseException:
        with suppress(OSError):
            work.rmdir()
        raise


def _is_finished(directory: Path) -> bool:
    """Whether a pass left its result there, and it can still be read."""
    try:
        read_weights(directory)
        _read_record(directory)
    except (FileNotFoundError, ValueError, KeyError, SafetensorError):
        return False
    return True


def _read_result(model: Model, directory: Path) -> Model:
    """What the pass whose result lies there made of ``model``."""
    bases = read_bases(directory / _BASES) if (directory / _BASES).is_file() else {}
    return replace(model.with_weights(read_weights(directory)), bases=bases)


def _read_record(directory: Path) -> PassRecord:
    return PassRecord.model_validate_json((directory / _RECORD).read_text(encoding="utf-8"))


def _run(
    step: NamedPass, model: Model, directory: Path, recipe: Recipe, context: PassContext, verifier: Verifier
) -> None:
    """Run one pass and leave its changed weights and its record in ``directory``."""
    options = step.instance.model_dump(mode="json", exclude_none=True)
    recorder = Recorder(step.name, options, strict=recipe.strict)
    store = WeightStore(directory)
    context = replace(
        context,
        seed=recipe.seed,
        strict=recipe.strict,
        verify=recipe.verify,
        threads=recipe.resources.thread_count,
        activation_bytes=recipe.resources.activation_bytes,
        note=recorder.note,
        fallback=recorder.fallback,
        detail=recorder.detail,
        keep=store.keep,
    )
    try:
        result = step.instance.run(model, context)
        _refuse_losses(step.name, model, result)
        for name, weight in result.weights.items():
            if weight is not model.weights.get(name) and not store.holds(name, weight):
                result = result.with_weights(store.keep({name: weight}))
        if step.instance.keeps_function and result is not model and recipe.verify != "none":
            recorder.detail("verification", verifier(step.name, model, result, level=recipe.verify, seed=recipe.seed))
    except (LlmoptError, OSError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        text = f"{step.name} crashed: {type(error).__name__}: {error}; this is a bug in the pass"
        raise PassError(text, hint="run again with --debug for the traceback") from error
    store.close()
    if result.bases:
        save_bases(result.bases, directory / _BASES)
    record = recorder.record(changed=result is not model)
    (directory / _RECORD).write_text(record.model_dump_json(), encoding="utf-8")


def _refuse_losses(name: str, model: Model, result: Model) -> None:
    """Only weights and bases are kept between passes, so that anything else a pass changed would be lost.

    Raises:
        PassError: Something else was changed, or a weight was removed.
    """
    lost = sorted(model.weights.keys() - result.weights.keys())
    if lost or (result.family, result.config) != (model.family, model.config):
        what = f"removed {lost[0]}" if lost else "changed the model's configuration"
        raise PassError(f"{name} {what}", hint="a pass may replace and add weights; this is a bug in the pass")


def _identity(step: NamedPass, cache: Path) -> Sequence[object]:
    """Which pass this is: name, options, the file that defines it, which may be another distribution's, and its files.

    These are known by what is in them: a recipe and its adapters may move.
    """
    file = step.instance.defined_in
    files = file_digests({str(number): path for number, path in enumerate(step.instance.files)}, cache)
    return [step.name, step.instance.model_dump(mode="json"), sha256_of(file) if file else "", files]


def _surroundings() -> Sequence[str | int]:
    """What else changes bits: the compiler's sources, the libraries that read and compute, threads and CPU."""
    level = os.environ.get("ATEN_CPU_CAPABILITY", torch.backends.cpu.get_cpu_capability())
    flags = sorted(name for name, has_it in torch.cpu.get_capabilities().items() if has_it is True)
    libraries = [torch.__version__, version("transformers")]
    return [sources_digest(), *libraries, torch.get_num_threads(), platform.machine(), level, *flags]


def _tell(record: PassRecord, progress: Progress) -> None:
    for text in (*record.fallbacks, *record.notes):
        progress.note(f"{record.name}: {text}")
