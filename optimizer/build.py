"""``llmopt build`` as one path: recipe in, directory with engine, measurements and verdict out."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmopt.optimizer.build_record import RECORD_NAME, BuildRecord
from llmopt.optimizer.cache import digest_of, locked, publish
from llmopt.optimizer.contents import layers_of, sizes_of
from llmopt.optimizer.contracts import PassContext, QuantPass
from llmopt.optimizer.errors import InputError, ResourceError
from llmopt.optimizer.gates import COSINES, Gate
from llmopt.optimizer.manifest import (
    MANIFEST_NAME,
    Checkpoint,
    EncoderEngine,
    Engine,
    FileEntry,
    Manifest,
    Measurement,
    PassRecord,
    SourceEntry,
    Verdict,
    sha256_of,
)
from llmopt.optimizer.memory_limit import memory_limit
from llmopt.optimizer.model import Model, QuantWeight
from llmopt.optimizer.model_check import check_model
from llmopt.optimizer.pipeline import run_passes
from llmopt.optimizer.progress import Progress
from llmopt.optimizer.recipe import Recipe
from llmopt.optimizer.sources import load_model

if TYPE_CHECKING:
    from llmopt.calibration.data import CalibrationData
    from llmopt.optimizer.tokens import Tokens

__all__ = ["build"]

_LIBRARIES = (
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "tensorrt",
    "tensorrt-rtx",
    "torch",
    "transformers",
)
_NOT_LISTED = (MANIFEST_NAME, RECORD_NAME, "tensorrt/timing.cache", "tensorrt/build.log")
"""What differs between two builds of one recipe."""

_MEASURING_BYTES = 3 << 30
"""Memory beside the engine's weights while it is measured: libraries, a layer of the source model, activations."""


def build(
    recipe: Recipe, output: Path, *, cache: Path, progress: Progress, force: bool = False, offline: bool = False
) -> Manifest:
    """Build ``recipe`` into ``output``, which appears whole or not at all.

    Args:
        recipe: Checked already.
        output: The build directory.
        cache: Where finished passes and downloads are kept.
        progress: Where steps are shown.
        force: Whether an existing build in ``output`` is replaced.
        offline: Whether hubs are left alone.

    Returns:
        The manifest; its verdict may be ``rejected``, in which case the build exists and says so.

    Raises:
        InputError: ``output`` exists, or is being written by another process; or the model cannot be read.
        PassError, UnsupportedError, VerificationError, ResourceError: As their names say.
    """
    from llmopt.calibration.same_function import verify_same_function
    from llmopt.evaluation.report import write_report

    record = BuildRecord()
    torch.set_num_threads(recipe.resources.thread_count)
    limit = memory_limit(recipe.resources.max_ram_gb, threads=recipe.resources.thread_count)
    with _exclusive(output, cache, force=force), publish(output.resolve()) as directory, limit:
        with record.step("load_model"):
            source = load_model(recipe.model, cache=cache, base=recipe.base, offline=offline)
            _check(recipe, source, output)
            yardstick = recipe.yardstick(source)
        with record.step("texts"):
            texts = _texts(recipe, recipe.accept, yardstick, progress)
            calibration = _calibration(recipe, yardstick, texts, cache, progress, offline=offline)
        with record.step("passes"):
            model, passes = run_passes(
                source,
                recipe,
                cache=cache,
                progress=progress,
                calibration=calibration,
                verifier=verify_same_function,
            )
        with record.step("export"):
            engines, encoders, checkpoints, graph_passes = _export(recipe, model, directory, progress)
            _copy_tokenizer(model, directory)
        with record.step("measure"):
            if source.is_encoder:
                measurements, verdict = _measure_vectors(
                    recipe, source, encoders, texts, directory, graph_passes, progress
                )
            else:
                judged = model if engines else _as_written(model, checkpoints, directory, cache)
                measurements, verdict = _measure(
                    recipe, yardstick, judged, engines, texts, directory, graph_passes, progress
                )
        manifest = Manifest(
            llmopt=version("llmopt"),
            versions=_versions(),
            source=_source_entry(source),
            recipe=recipe.resolved(),
            architecture=model.family.name,
            calibration=None if calibration is None else calibration.entry(),
            layers=layers_of(model, passes),
            sizes=sizes_of(model),
            passes=passes,
            graph_passes=graph_passes,
            engines=engines,
            encoders=encoders,
            checkpoints=checkpoints,
            measurements=measurements,
            verdict=verdict,
        )
        write_report(manifest, directory)
        manifest = manifest.model_copy(update={"files": _files(directory)})
        manifest.save(directory)
        record.save(directory)
    return manifest


def _source_entry(model: Model) -> SourceEntry:
    source = model.source
    return SourceEntry(spec=source.spec, digest=source.digest, files=dict(source.files), notes=list(source.notes))


def _refuse_existing(output: Path, *, force: bool) -> None:
    if not output.exists():
        return
    if not all((output / name).is_file() for name in (MANIFEST_NAME, RECORD_NAME)):
        raise InputError(f"{output} exists and is no build of llmopt", hint="name another directory with -o")
    if not force:
        raise InputError(f"{output} exists", hint="--force replaces it, or name another directory with -o")


@contextmanager
def _exclusive(output: Path, cache: Path, *, force: bool) -> Iterator[None]:
    """Let no second build write ``output``; the lock lies in the cache, so nothing is left beside the build."""
    try:
        with locked(cache / "locks" / digest_of(str(output.resolve())), wait=False):
            # Only now: a build that held the lock may just have finished.
            _refuse_existing(output, force=force)
            yield
    except BlockingIOError as error:
        raise InputError(f"another build is writing {output}", hint="wait for it, or use another directory") from error


def _check(recipe: Recipe, model: Model, output: Path) -> None:
    """What can be found out before any tensor is read: does the model fit the recipe, and the disk the files."""
    check_model(recipe, model)
    _check_metrics(recipe.accept, model)
    needed = 0
    quantizes = any(isinstance(step.instance, QuantPass) and not step.instance.leaves_floats for step in recipe.passes)
    for item in recipe.export:
        # The estimate is of the model as it is: one that is quantized after it needs no more than half of it.
        needed += item.instance.estimate(model) // (2 if quantizes else 1)
        _check_gates(recipe.accept, item.instance.longest(model))
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ResourceError(
            f"the build needs about {needed / 1e9:.1f} GB, the disk of {parent} has {free / 1e9:.1f} GB free",
            hint="free some space, or name a directory on another disk with -o",
        )


def _check_metrics(gates: Sequence[Gate], model: Model) -> None:
    """An encoder is measured by its vectors, on text that the recipe names: it writes none itself."""
    for i, gate in enumerate(gates):
        if (gate.metric in COSINES) != model.is_encoder:
            kind = "encoder" if model.is_encoder else "decoder"
            fitting = " and ".join(COSINES) if model.is_encoder else "kl, top1 and perplexity"
            raise InputError(
                f"accept.{i}: {gate.metric} is no metric of a model like {model.source.spec}, which is a {kind}"
                f" ({model.family.name})",
                hint=f"metrics of {kind}s: {fitting}",
            )
    if model.is_encoder and not gates:
        raise InputError(
            f"{model.source.spec} is an encoder ({model.family.name}), and the recipe names no text to measure it on",
            hint="accept: [{metric: cosine, min: 0.99, data: texts.txt}], a text on each line of that file",
        )


def _check_gates(gates: Sequence[Gate], longest: int | None) -> None:
    for gate in gates:
        if longest is not None and gate.tokens > longest:
            raise InputError(
                f"the gate on {gate.metric} has windows of {gate.tokens} tokens, the engine takes {longest}",
                hint="lower the gate's tokens",
            )


def _export(
    recipe: Recipe, model: Model, directory: Path, progress: Progress
) -> tuple[list[Engine], list[EncoderEngine], list[Checkpoint], dict[str, list[PassRecord]]]:
    """What was written, and what each graph pass did by the engine's path."""
    engines: list[Engine] = []
    encoders: list[EncoderEngine] = []
    checkpoints: list[Checkpoint] = []
    records: dict[str, list[PassRecord]] = {}
    for item in recipe.export:
        with progress.step(f"export {item.name}") as tick:
            context = PassContext(
                seed=recipe.seed,
                strict=recipe.strict,
                verify=recipe.verify,
                threads=recipe.resources.thread_count,
                progress=tick,
            )
            written, graph_records = item.instance.export(model, directory, context)
        if isinstance(written, Checkpoint):
            checkpoints.append(written)
        elif isinstance(written, EncoderEngine):
            encoders.append(written)
        else:
            engines.append(written)
        if graph_records:
            records[written.path] = graph_records
    return engines, encoders, checkpoints, records


def _copy_tokenizer(model: Model, directory: Path) -> None:
    """Everything a server needs besides the engine lies in the build."""
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "config.json")
    for name in names:
        if (path := model.source.tokenizer_dir / name).is_file():
            shutil.copyfile(path, directory / name)


def _texts(recipe: Recipe, gates: Sequence[Gate], source: Model, progress: Progress) -> "list[Tokens]":
    """The gates' texts, read or sampled before any pass runs, so that one that is too short is found at once."""
    from llmopt.evaluation.gates import texts_for

    with progress.step("texts") as tick:
        return texts_for(
            gates, source, base=recipe.base, seed=recipe.seed, threads=recipe.resources.thread_count, progress=tick
        )


def _calibration(
    recipe: Recipe, source: Model, texts: "list[Tokens]", cache: Path, progress: Progress, *, offline: bool
) -> "CalibrationData | None":
    """The text that passes will look at, made before any of them runs; None where none does.

    Raises:
        InputError: It cannot be used, or the build would be judged on it.
    """
    from llmopt.calibration.data import checked_calibration

    if not recipe.needs_calibration:
        if recipe.calibration is not None:
            progress.note("calibration: no pass of this recipe looks at text, so it is not read")
        return None
    with progress.step("calibration text") as tick:
        return checked_calibration(recipe, source, texts, cache=cache, offline=offline, progress=tick)


def _measure(
    recipe: Recipe,
    source: Model,
    model: Model,
    engines: list[Engine],
    texts: "list[Tokens]",
    directory: Path,
    records: dict[str, list[PassRecord]],
    progress: Progress,
) -> tuple[list[Measurement], Verdict]:
    """Measure the engine against the source model on the gates' texts, and judge it; without one, ``model``.

    A recipe without gates is measured on text sampled from the model, so that no build goes unmeasured. Of engines for
    other machines the largest activations are looked for too, and added to ``records``.
    """
    from llmopt.evaluation.gates import judge
    from llmopt.evaluation.measure import measure, measure_model
    from llmopt.evaluation.proxy import measurable

    threads = recipe.resources.thread_count
    if not texts:
        usual = Gate(metric="kl", max=0)
        longest = engines[0].capacity if engines else source.decoder.max_positions
        fitting = usual.model_copy(update={"tokens": min(usual.tokens, longest)})
        texts = _texts(recipe, [fitting], source, progress)
    if not engines:
        with progress.step("measure") as tick:
            found = measure_model(source, model, texts, threads=threads, progress=tick)
        return found, judge(recipe.accept, found)
    packed = _may_pack(recipe, model, directory, engines[0])
    if not packed:
        progress.note("measuring with the weights as they lie in the file, since a packed copy exceeds max_ram_gb")
    longest = max(text.ids.shape[1] for text in texts)
    measured = measurable(directory, engines[0], longest=longest, threads=threads, packed=packed)
    measured.tell(progress)
    with progress.step("measure") as tick:
        measurements = measure(source, measured.open, texts, threads=threads, progress=tick)
    verdict = judge(recipe.accept, measurements).model_copy(update={"proxy": measured.proxy})
    _check_ranges(engines, [layer.name for layer in model.decoder.layers], texts, directory, records, threads)
    return measurements, verdict


def _as_written(model: Model, checkpoints: list[Checkpoint], directory: Path, cache: Path) -> Model:
    """The model as other programs will read it: with scales and floats in the dtype that they were written in.

    Where nothing that was written can be read as a model, such as a graph for another runtime: ``model``.
    """
    folders = (directory / each.path for each in checkpoints)
    readable = next((folder for folder in folders if any(folder.glob("*.safetensors"))), None)
    return model if readable is None else load_model(str(readable), cache=cache)


def _measure_vectors(
    recipe: Recipe,
    source: Model,
    encoders: list[EncoderEngine],
    texts: "list[Tokens]",
    directory: Path,
    records: dict[str, list[PassRecord]],
    progress: Progress,
) -> tuple[list[Measurement], Verdict]:
    """Measure an encoder's engine against the source model on the gates' texts, and judge it."""
    from llmopt.evaluation.gates import judge
    from llmopt.evaluation.proxy import measurable_encoder
    from llmopt.evaluation.vectors import measure_vectors

    threads = recipe.resources.thread_count
    measured = measurable_encoder(directory, encoders[0], threads=threads)
    measured.tell(progress)
    with progress.step("measure") as tick:
        found = measure_vectors(source, measured.open(), texts, threads=threads, progress=tick)
    _check_ranges(encoders, [layer.name for layer in source.encoder.layers], texts, directory, records, threads)
    return found, judge(recipe.accept, found).model_copy(update={"proxy": measured.proxy})


def _check_ranges(
    engines: Sequence[Engine | EncoderEngine],
    layers: Sequence[str],
    texts: "list[Tokens]",
    directory: Path,
    records: dict[str, list[PassRecord]],
    threads: int,
) -> None:
    """Look for the largest activations of engines that this machine does not execute, and record them."""
    from llmopt.evaluation.proxy import check_range

    for engine in engines:
        if engine.target != "cpu":
            records[engine.path].append(check_range(directory, engine, texts, layers=layers, threads=threads))


def _may_pack(recipe: Recipe, model: Model, directory: Path, engine: Engine) -> bool:
    """Whether ONNX Runtime may hold its packed copy of the weights beside the engine's own while it loads.

    Where only integers are multiplied the numbers are the same without. Kernels of weight-only schemes compute others,
    so such a build is measured as it is served, or fails at its limit.
    """
    limit = recipe.resources.max_ram_gb
    quantized = [weight for weight in model.weights.values() if isinstance(weight, QuantWeight)]
    if limit is None or any(weight.scheme.input_activations is None for weight in quantized):
        return True
    weights = sum(path.stat().st_size for path in (directory / engine.path).parent.glob("model.onnx*"))
    return 2 * weights + _MEASURING_BYTES <= limit * 1e9


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _files(directory: Path) -> dict[str, FileEntry]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in paths}
    return {
        name: FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
        for name, path in names.items()
        if name not in _NOT_LISTED
    }
