"""Runs weight passes in order, each from the cache when it has run on the same input before."""

import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from llmopt.optimizer.cache import digest_of, locked, publish, sources_digest
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import LlmoptError, PassError, is_out_of_memory
from llmopt.optimizer.manifest import PassRecord
from llmopt.optimizer.model import Model
from llmopt.optimizer.progress import Progress
from llmopt.optimizer.recipe import NamedPass, Recipe
from llmopt.optimizer.records import Recorder
from llmopt.optimizer.weight_store import WeightStore, read_weights

__all__ = ["run_passes"]

_RECORD = "record.json"


def run_passes(model: Model, recipe: Recipe, *, cache: Path, progress: Progress) -> tuple[Model, list[PassRecord]]:
    """Apply the recipe's passes.

    A result is kept under the digest of everything that determines it: the input, the pass and its options, the
    seed, llmopt's own sources, threads and CPU features. So a changed option runs again from there on, and a build
    that was killed continues behind the last finished pass.

    Returns:
        The model, its changed weights memory-mapped from the cache, and a record per pass.

    Raises:
        PassError: A pass refuses the model, fails, or falls back under ``strict``.
    """
    records: list[PassRecord] = []
    digest = model.source.digest
    for step in recipe.passes:
        step.instance.requires(model)
        digest = digest_of([digest, step.name, step.instance.model_dump(mode="json"), recipe.seed, *_surroundings()])
        directory = cache / "passes" / digest
        with progress.step(step.name) as tick, locked(directory):
            if not (directory / _RECORD).is_file():
                with publish(directory) as partial:
                    _run(step, model, partial, recipe, PassContext(progress=tick))
            model = model.with_weights(read_weights(directory))
        records.append(PassRecord.model_validate_json((directory / _RECORD).read_text(encoding="utf-8")))
        _tell(records[-1], progress)
    return model, records


def _run(step: NamedPass, model: Model, directory: Path, recipe: Recipe, context: PassContext) -> None:
    """Run one pass and leave its changed weights and its record in ``directory``."""
    options = step.instance.model_dump(mode="json", exclude_none=True)
    recorder = Recorder(step.name, options, strict=recipe.strict)
    store = WeightStore(directory)
    context = replace(
        context,
        seed=recipe.seed,
        strict=recipe.strict,
        verify=recipe.verify,
        note=recorder.note,
        fallback=recorder.fallback,
        detail=recorder.detail,
        keep=store.keep,
    )
    try:
        result = step.instance.run(model, context)
    except (LlmoptError, OSError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        text = f"{step.name} crashed: {type(error).__name__}: {error}; this is a bug in the pass"
        raise PassError(text, hint="run again with --debug for the traceback") from error
    for name, weight in result.weights.items():
        if weight is not model.weights.get(name) and not store.holds(name):
            store.keep({name: weight})
    store.close()
    record = recorder.record(changed=result is not model)
    (directory / _RECORD).write_text(record.model_dump_json(), encoding="utf-8")


def _surroundings() -> Sequence[str | int]:
    """What else changes bits: the compiler's sources, the library that computes, threads and CPU."""
    flags = os.environ.get("ATEN_CPU_CAPABILITY", torch.backends.cpu.get_cpu_capability())
    return [sources_digest(), torch.__version__, torch.get_num_threads(), platform.machine(), flags]


def _tell(record: PassRecord, progress: Progress) -> None:
    for text in (*record.fallbacks, *record.notes):
        progress.note(f"{record.name}: {text}")
