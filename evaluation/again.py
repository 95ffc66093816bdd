"""Judging a finished build again: its gates with the texts at hand, or other texts than those it was built with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from llmopt.calibration.lines import read_lines
from llmopt.calibration.sampling import Sampling, sample_tokens
from llmopt.calibration.texts import read_tokens
from llmopt.evaluation.gates import gates_of, judge, texts_for
from llmopt.evaluation.measure import measure
from llmopt.evaluation.proxy import measurable, measurable_encoder
from llmopt.evaluation.vectors import measure_vectors
from llmopt.optimizer import loader
from llmopt.optimizer.cache import cache_root
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.gates import SAMPLED_WINDOWS, Gate
from llmopt.optimizer.manifest import EncoderEngine, Manifest, Measurement, Verdict, sha256_of
from llmopt.optimizer.model import Model
from llmopt.optimizer.progress import Progress
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens
from llmopt.runtime.backends.opening import Executor, pick_encoder, pick_engine

__all__ = ["FILE_WINDOWS", "Question", "Result", "evaluate"]

FILE_WINDOWS = (8, 1024)
"""Windows, and tokens of each, where a user names none."""

FILE_LINES = 256
"""Lines that an encoder is measured on."""


@dataclass(frozen=True, slots=True)
class Question:
    """What to measure a build on.

    Attributes:
        data: Text files. One that is called like a gate's text is used for that gate, in the gate's windows.
        windows: Of the other texts; None means 8 of a file and 16 of sampled text. Of an encoder's texts, lines: 256.
        tokens: Per window; None means 1024 of a file and 128 of sampled text, or what the engine takes.
        source: Where the source model is now; None means where the build found it.
        threads: Of the engine and of PyTorch.
        offline: Whether hubs are left alone.
        executor: Which of the build's engines is measured, and by what it is executed.
    """

    data: tuple[Path, ...] = ()
    windows: int | None = None
    tokens: int | None = None
    source: str | None = None
    threads: int = 1
    offline: bool = False
    executor: Executor = field(default_factory=Executor)


@dataclass(frozen=True, slots=True)
class Result:
    """What was found.

    Attributes:
        measurements: Of all texts.
        verdict: Of the gates whose texts were at hand; ``unjudged`` when there were none.
        not_judged: Gates that name a text that was not given.
        notes: What the reader should know about the texts.
    """

    measurements: list[Measurement]
    verdict: Verdict
    not_judged: list[Gate]
    notes: list[str]


def evaluate(directory: Path, question: Question, progress: Progress) -> Result:
    """Measure the build in ``directory`` against its source model; the build is not changed.

    Raises:
        InputError: There is no build, its source model is gone or another one, or a text cannot be used.
        VerificationError: The build was changed.
    """
    manifest = Manifest.load(directory)
    if not manifest.all_engines:
        raise InputError(f"{directory} has no engine that could be measured")
    gates, not_judged = _with_data(gates_of(manifest.recipe), question.data)
    if manifest.encoders and not question.data:
        raise InputError(
            f"{directory} is a build of an encoder, which writes no text to be measured on",
            hint="--data names a file with a text on each line",
        )
    encoder = pick_encoder(directory, manifest, question.executor) if manifest.encoders else None
    with progress.step("load the source model"):
        model = _source(manifest, question)
    if encoder is not None:
        measurements = _vectors(directory, encoder, gates, question, model, progress)
        return Result(measurements, judge(gates, measurements), not_judged, _changed_texts(manifest, measurements))
    model = _with_adapters(manifest, model)
    engine = pick_engine(directory, manifest, question.executor)
    texts = _texts(gates, model, manifest, question, progress)
    longest = max(text.ids.shape[1] for text in texts)
    measured = measurable(directory, engine, question.executor, longest=longest, threads=question.threads)
    measured.tell(progress)
    with progress.step("measure") as tick:
        measurements = measure(model, measured.open, texts, threads=question.threads, progress=tick)
    return Result(measurements, judge(gates, measurements), not_judged, _changed_texts(manifest, measurements))


def _vectors(
    directory: Path, engine: EncoderEngine, gates: Sequence[Gate], question: Question, model: Model, progress: Progress
) -> list[Measurement]:
    """What is measured of an encoder: on the gates' texts, and on the lines of the other files given."""
    named = {gate.data for gate in gates}
    lines, tokens = question.windows or FILE_LINES, question.tokens or engine.capacity
    folder = model.source.tokenizer_dir
    texts = texts_for(gates, model)
    texts += [read_lines(path, folder, lines=lines, tokens=tokens) for path in question.data if path not in named]
    measured = measurable_encoder(directory, engine, question.executor, threads=question.threads)
    measured.tell(progress)
    with progress.step("measure") as tick:
        return measure_vectors(model, measured.open(), texts, threads=question.threads, progress=tick)


def _source(manifest: Manifest, question: Question) -> Model:
    spec = question.source or manifest.source.spec
    hint = "--source names the checkpoint the build was made from, where it is now"
    try:
        model = load_model(spec, cache=cache_root(), offline=question.offline)
    except InputError as error:
        raise InputError(f"the build's source model cannot be read: {error.message}", hint=hint) from error
    if model.source.digest != manifest.source.digest:
        now, then = model.source.files, manifest.source.files
        changed = sorted(name for name in {*now, *then} if now.get(name) != then.get(name))
        raise InputError(
            f"{spec} is not the model this build was made from; other contents: {', '.join(changed)}", hint=hint
        )
    return model


def _with_adapters(manifest: Manifest, source: Model) -> Model:
    """What the build was measured against: the source model with the adapters that were merged into it.

    Raises:
        InputError: They are not where the recipe says, seen from here, or are others.
    """
    seed = int(manifest.recipe.get("seed", 0))
    for record, item in zip(manifest.passes, manifest.recipe.get("passes", []), strict=False):
        ((name, options),) = item.items()
        kind = loader.load("passes", name)
        if not kind.trained_on_source:
            continue
        hint = "run llmopt eval in the folder that the recipe was in, with the adapters that it had"
        try:
            step = kind.model_validate(options)
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise InputError(f"the adapters that were merged by {name} cannot be read: {said}", hint=hint) from error
        if [sha256_of(file) for file in step.files] != record.details.get("files"):
            raise InputError(f"the adapters that were merged by {name} have changed", hint=hint)
        source = step.yardstick(source, seed)
    return source


def _with_data(gates: Sequence[Gate], data: Sequence[Path]) -> tuple[list[Gate], list[Gate]]:
    """Gates whose text is at hand, with where it is; and the others.

    A build does not know where its recipe was, so a text is found by its file name among those given.
    """
    given = {path.name: path for path in data}
    ready, missing = [], []
    for gate in gates:
        if gate.data is None:
            ready.append(gate)
        elif gate.data.name in given:
            ready.append(gate.model_copy(update={"data": given[gate.data.name]}))
        else:
            missing.append(gate)
    return ready, missing


def _texts(
    gates: Sequence[Gate], model: Model, manifest: Manifest, question: Question, progress: Progress
) -> list[Tokens]:
    """The gates' texts, the other files given, and sampled text when that leaves nothing."""
    seed, capacity = int(manifest.recipe.get("seed", 0)), min(engine.capacity for engine in manifest.engines)
    with progress.step("read or sample texts") as tick:
        texts = texts_for(gates, model, seed=seed, threads=question.threads, progress=tick)
        named = {gate.data for gate in gates}
        windows, tokens = question.windows or FILE_WINDOWS[0], question.tokens or min(FILE_WINDOWS[1], capacity)
        for path in question.data:
            if path not in named:
                texts.append(read_tokens(path, model.source.tokenizer_dir, windows=windows, tokens=tokens))
        if not texts:
            windows, tokens = (
                question.windows or SAMPLED_WINDOWS[0],
                question.tokens or min(SAMPLED_WINDOWS[1], capacity),
            )
            wanted = Sampling("evaluation", windows, tokens, seed=seed)
            texts.append(sample_tokens(model, wanted, threads=question.threads, progress=tick))
    _refuse_calibration_text(manifest, texts)
    return texts


def _refuse_calibration_text(manifest: Manifest, texts: Sequence[Tokens]) -> None:
    """Judge no build on the file that its passes looked at."""
    for text in texts:
        if manifest.calibration is not None and text.digest == manifest.calibration.digest:
            raise InputError(
                f"the build was calibrated on {manifest.calibration.name}, and {text.name} is the same text",
                hint="measure on other text: on this one the build looks better than it is",
            )


def _changed_texts(manifest: Manifest, measurements: Sequence[Measurement]) -> list[str]:
    """A note for each text that has the name of one the build was measured on, and other contents."""
    built_on: dict[str, set[str]] = {}
    for each in manifest.measurements:
        built_on.setdefault(Path(each.data).name, set()).add(each.data_digest)
    return [
        f"{data} is not the text of that name which the build was measured on"
        for data, digest in dict.fromkeys((each.data, each.data_digest) for each in measurements)
        if digest not in built_on.get(Path(data).name, {digest}) and data != "sampled"
    ]
