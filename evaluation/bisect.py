"""Which pass costs how much: a recipe's passes run one by one, and the model is measured behind each of them."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import onnx_ir as ir
import torch
from torch import Tensor

from llmopt.calibration.data import checked_calibration
from llmopt.calibration.same_function import verify_same_function
from llmopt.calibration.sampling import Sampling, sample_tokens
from llmopt.calibration.texts import read_tokens
from llmopt.evaluation.again import FILE_WINDOWS
from llmopt.evaluation.graph_logits import graph_logits
from llmopt.evaluation.pages import nats
from llmopt.evaluation.paired import Agreement, Yardstick, model_logits
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.gates import SAMPLED_WINDOWS
from llmopt.optimizer.manifest import PassRecord
from llmopt.optimizer.model import Model
from llmopt.optimizer.model_check import check_model
from llmopt.optimizer.pipeline import each_pass
from llmopt.optimizer.progress import Progress, Tick
from llmopt.optimizer.recipe import Recipe
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens

__all__ = ["Bisection", "Kind", "Stage", "Step", "Text", "bisect"]

Kind = Literal["source", "weight pass", "standard graph", "graph pass"]

_NOISE = 3.0
"""Standard errors within which a change of the mean says nothing. A lowering has a dozen steps without a cause: with 16
windows one in a hundred of their changes is beyond three errors, while one in sixteen would be beyond two."""


class Stage(Protocol):
    """A graph on its way through the graph passes, as ``exporters/onnx/lowering.py`` yields it."""

    @property
    def name(self) -> str:
        """``standard``, or the graph pass that just ran."""

    @property
    def graph(self) -> ir.Model:
        """Changed in place by the next stage."""

    @property
    def record(self) -> PassRecord | None:
        """Of the graph pass; None for the standard graph."""


@dataclass(frozen=True, slots=True)
class Text:
    """What to measure on.

    Attributes:
        data: A text file; None means text sampled from the source model.
        windows: How many; None means 8 of a file and 16 of sampled text.
        tokens: Per window; None means 1024 of a file and 128 of sampled text.
    """

    data: Path | None = None
    windows: int | None = None
    tokens: int | None = None

    @property
    def count(self) -> int:
        """How many windows."""
        return self.windows or (SAMPLED_WINDOWS if self.data is None else FILE_WINDOWS)[0]

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.tokens or (SAMPLED_WINDOWS if self.data is None else FILE_WINDOWS)[1]


@dataclass(frozen=True, slots=True)
class Step:
    """One row of the table.

    Attributes:
        name: The pass, ``source model`` or ``standard graph``.
        kind: What it is.
        changed: Whether there was anything to measure; the numbers of a pass that changed nothing are the former ones.
        applied: How often a graph pass applied; None for all else.
        kl: Mean KL divergence from the source model, nats per token.
        top1: Share of tokens with the source model's most likely successor.
        change: Of ``kl`` by this step.
        error: The standard error of ``change``; None where one window gives no scatter.
        seconds: Of the step and its measurement.
    """

    name: str
    kind: Kind
    changed: bool
    applied: int | None
    kl: float
    top1: float
    change: float
    error: float | None
    seconds: float

    @property
    def is_noise(self) -> bool:
        """Whether a change this large also comes without any cause."""
        return abs(self.change) <= _NOISE * (self.error or 0.0)


@dataclass(frozen=True, slots=True)
class Bisection:
    """What was found.

    Attributes:
        model: The source model, as in the recipe.
        text: What it was measured on.
        steps: In order, the source model first.
    """

    model: str
    text: Tokens
    steps: tuple[Step, ...]

    @property
    def worst(self) -> Step | None:
        """The step that costs most; None where no step costs more than the noise."""
        costly = [step for step in self.steps if step.change > 0 and not step.is_noise]
        return max(costly, key=lambda step: step.change, default=None)

    @property
    def conclusion(self) -> str:
        """The one sentence to remember."""
        if self.worst is None:
            return "No pass costs more than the noise of this measurement."
        error = "" if self.worst.error is None else f" ± {nats(self.worst.error)}"
        return (
            f"{self.worst.name} costs most: {nats(self.worst.change)}{error} nats per token of the "
            f"{nats(self.steps[-1].kl)} after the last step."
        )


def bisect(
    recipe: Recipe,
    text: Text,
    stages: Callable[[Model], Iterator[Stage]],
    *,
    cache: Path,
    progress: Progress,
    offline: bool = False,
) -> Bisection:
    """Measure a recipe's model behind each weight pass, then its graph behind each graph pass, on the same tokens.

    Args:
        recipe: Its weight passes run, or come from the cache as in a build. Nothing is exported.
        text: What to measure on.
        stages: The graphs that the recipe's engine comes from, the standard graph first; none where it has no engine.
        cache: Where finished passes and downloads are kept.
        progress: Where steps are shown.
        offline: Whether hubs are left alone.

    Raises:
        InputError: The model or the text cannot be used.
        PassError: A pass refuses the model or fails.
        UnsupportedError: The model cannot be exported.
        VerificationError: ONNX Runtime cannot run a graph.
    """
    if text.data is not None and not text.data.is_file():
        raise InputError(f"there is no text {text.data}", hint="without --data, text is sampled from the model")
    threads = recipe.resources.thread_count
    torch.set_num_threads(threads)  # passes in the cache are found by it
    with progress.step("load the model"):
        model = load_model(recipe.model, cache=cache, base=recipe.base, offline=offline)
        text = _fitting(recipe, model, text)
        measured = recipe.yardstick(model)
    with progress.step("texts") as tick:
        tokens = _tokens(text, measured, seed=recipe.seed, threads=threads, tick=tick)
        calibration = checked_calibration(recipe, measured, [tokens], cache=cache, offline=offline, progress=tick)
    started = time.monotonic()
    with progress.step("source model"):
        yardstick = Yardstick(measured, tokens.ids, threads=threads)
    source = Step("source model", "source", True, None, 0.0, 1.0, 0.0, None, time.monotonic() - started)
    passes = each_pass(
        model, recipe, cache=cache, progress=progress, calibration=calibration, verifier=verify_same_function
    )
    runs = _runs(passes, model, stages, tokens.ids, threads=threads)
    return Bisection(model.source.spec, tokens, (source, *_measured(runs, yardstick, progress)))


def _fitting(recipe: Recipe, model: Model, text: Text) -> Text:
    """``text`` in windows that the model and its engines take. Finds out what can be before any tensor is read.

    Raises:
        InputError: Longer windows were asked for.
    """
    check_model(recipe, model)
    found = (item.instance.longest(model) for item in recipe.export)
    longest = min((each for each in found if each is not None), default=model.decoder.max_positions)
    if text.length <= longest:
        return text
    if text.tokens is None:
        return replace(text, tokens=longest)
    raise InputError(
        f"windows of {text.length} tokens were asked for, the engine takes {longest}",
        hint="lower --tokens, or raise the exporter's capacity",
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """One execution to measure; ``logits`` is called before the next one is asked for."""

    name: str
    kind: Kind
    changed: bool
    applied: int | None
    logits: Callable[[], Iterator[Tensor]]


def _runs(
    passes: Iterator[tuple[Model, PassRecord]],
    model: Model,
    stages: Callable[[Model], Iterator[Stage]],
    ids: Tensor,
    *,
    threads: int,
) -> Iterator[_Run]:
    """Every execution of the recipe's model, made when it is asked for."""
    behind = model
    for behind, record in passes:
        logits = partial(model_logits, behind, ids, threads=threads)
        yield _Run(record.name, "weight pass", record.changed, None, logits)
    for stage in stages(behind):
        name = "standard graph" if stage.record is None else stage.name
        logits = partial(graph_logits, stage.graph, ids, name=name, threads=threads)
        if stage.record is None:
            yield _Run(name, "standard graph", True, None, logits)
        else:
            yield _Run(name, "graph pass", stage.record.changed, stage.record.details.get("applied"), logits)


def _measured(runs: Iterator[_Run], yardstick: Yardstick, progress: Progress) -> Iterator[Step]:
    """A step per run; what changed nothing keeps the numbers of the one before."""
    before = Agreement.perfect(yardstick.ids.shape)
    started = time.monotonic()
    for run in runs:
        found = before
        if run.changed:
            with progress.step(f"measure {run.name}"):
                found = yardstick.compare(run.logits())
        change, error = found.change_from(before) if run.changed else (0.0, None)
        now = time.monotonic()
        numbers = (found.mean_kl, found.top1, change, error, now - started)
        yield Step(run.name, run.kind, run.changed, run.applied, *numbers)
        before, started = found, now


def _tokens(text: Text, model: Model, *, seed: int, threads: int, tick: Tick) -> Tokens:
    if text.data is not None:
        return read_tokens(text.data, model.source.tokenizer_dir, windows=text.count, tokens=text.length)
    wanted = Sampling("evaluation", text.count, text.length, seed=seed)
    return sample_tokens(model, wanted, threads=threads, progress=tick)
