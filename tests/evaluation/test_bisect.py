"""Bisections of tiny recipes: every step measured by itself, and the one that costs most named."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from llmopt.calibration.divergence import kl_divergence
from llmopt.calibration.reference import Reference
from llmopt.evaluation import bisect as module
from llmopt.evaluation.bisect import Bisection, Stage, Step, Text, bisect
from llmopt.exporters.onnx.lowering import stages
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import InputError, PassError, UnsupportedError
from llmopt.optimizer.manifest import PassRecord
from llmopt.optimizer.model import Model
from llmopt.optimizer.progress import Silent
from llmopt.optimizer.recipe import Recipe
from llmopt.optimizer.target import TARGETS
from llmopt.optimizer.tokens import Tokens

SHORT = Text(windows=4, tokens=24)


@dataclass
class Made:
    name: str
    graph: ir.Model
    record: PassRecord | None


def no_graphs(model: Model) -> Iterator[Stage]:
    yield from ()


def real(model: Model) -> Iterator[Stage]:
    return stages(model, TARGETS["cpu"], capacity=256)


def made(*effects: tuple[str, Callable[[ir.Model], bool]]) -> Callable[[Model], Iterator[Stage]]:
    """The standard graph, then what functions make of it; each says whether it changed anything."""

    def stages_of(model: Model) -> Iterator[Stage]:
        graph = next(real(model)).graph
        yield Made("standard", graph, None)
        for name, effect in effects:
            changed = effect(graph)
            yield Made(name, graph, PassRecord(name=name, changed=changed, details={"applied": int(changed)}))

    return stages_of


def nothing(graph: ir.Model) -> bool:
    return False


def scale_last_norm(graph: ir.Model) -> bool:
    """Multiply the last norm's weight: sharper predictions."""
    value = graph.graph.initializers["model.norm.weight"]
    value.const_value = ir.tensor((value.const_value.numpy() * np.float32(1.5)).astype(np.float32), name=value.name)
    return True


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path):
    """A recipe of the tiny model with these passes; keywords change it."""

    def recipe_(*passes: object, **changes: object) -> Recipe:
        settings = {
            "version": 1, "model": str(tiny_llama), "passes": list(passes), "export": [{"onnx": {"target": "cpu"}}],
            "resources": {"threads": 1}, **changes,
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
        return Recipe.load(tmp_path / "recipe.yaml")

    return recipe_


@pytest.fixture
def run(tmp_path: Path):
    def run_(recipe: Recipe, stages_of=no_graphs, text: Text = SHORT) -> Bisection:
        return bisect(recipe, text, stages_of, cache=tmp_path / "cache", progress=Silent())

    return run_


ROUND = {"round_to_nearest": {"scheme": "W4A16", "group_size": 32}}
KEEP = {"round_to_nearest": {"scheme": "W8A8", "overrides": [{"match": "re:.*", "scheme": "none"}]}}


def test_steps_come_in_the_order_of_a_build(run, recipe) -> None:
    found = run(recipe(ROUND), real)
    kinds = [(step.name, step.kind) for step in found.steps]
    assert kinds == [
        ("source model", "source"),
        ("round_to_nearest", "weight pass"),
        ("standard graph", "standard graph"),
        *((name, "graph pass") for name in TARGETS["cpu"].graph_passes),
    ]
    assert all((step.applied is not None) == (step.kind == "graph pass") for step in found.steps)
    assert (found.text.name, found.text.ids.shape) == ("sampled", (4, 24))


def test_a_weight_pass_costs_what_the_reference_says(run, recipe, tiny_model: Model) -> None:
    found = run(recipe(ROUND))
    source, step = found.steps
    rounded = recipe(ROUND).passes[0].instance.run(tiny_model, PassContext())
    logits = [Reference(model).logits(found.text.ids) for model in (tiny_model, rounded)]
    expected = kl_divergence(*(each.reshape(96, -1) for each in logits))
    assert step.kl == pytest.approx(float(expected.mean()), rel=1e-5)
    assert step.top1 == float((logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean())
    assert (source.kl, source.top1) == (0.0, 1.0)
    assert step.change == pytest.approx(step.kl)
    assert found.worst is step


def test_a_graph_that_loses_nothing_adds_nothing(run, recipe) -> None:
    found = run(recipe(ROUND), made(("nothing", nothing)))
    rounded, standard = found.steps[1], found.steps[2]
    assert abs(standard.change) < 1e-3 * rounded.kl  # one float model, executed twice
    assert found.worst is rounded


def test_the_graph_pass_that_costs_most_is_named(run, recipe) -> None:
    found = run(recipe(ROUND), made(("harmless", nothing), ("harmful", scale_last_norm)))
    worst = found.steps[-1]
    assert found.worst is worst
    assert (worst.name, worst.applied, worst.is_noise) == ("harmful", 1, False)
    assert worst.change == pytest.approx(worst.kl - found.steps[-2].kl)
    assert found.conclusion.startswith(f"harmful costs most: {worst.change:.4f} ± {worst.error:.4f} nats per token")


def test_what_changed_nothing_is_not_executed_again(run, recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    executed = []
    original = module.graph_logits

    def counting(graph, ids, *, name, threads):
        executed.append(name)
        return original(graph, ids, name=name, threads=threads)

    monkeypatch.setattr(module, "graph_logits", counting)
    found = run(recipe(KEEP), made(("first", nothing), ("second", scale_last_norm), ("third", nothing)))
    assert executed == ["standard graph", "second"]
    kept, third = found.steps[1], found.steps[-1]
    assert (kept.changed, kept.kl, kept.top1, kept.change) == (False, 0.0, 1.0, 0.0)
    assert (third.changed, third.kl, third.change) == (False, found.steps[-2].kl, 0.0)


def test_no_step_is_named_where_all_change_is_noise(run, recipe) -> None:
    found = run(recipe(), made(("nothing", nothing)))
    assert found.worst is None
    assert found.conclusion == "No pass costs more than the noise of this measurement."


def step_of(change: float, error: float | None) -> Step:
    return Step("it", "graph pass", True, 1, 0.1, 0.9, change, error, 1.0)


@pytest.mark.parametrize(
    ("change", "error", "is_noise"),
    [
        (0.1, 0.03, False),
        (0.1, 0.04, True),
        (-0.1, 0.04, True),
        (-0.1, 0.03, False),
        (0.0, None, True),
        (0.1, None, False),
    ],
)
def test_a_change_within_three_errors_is_noise(change: float, error: float | None, is_noise: bool) -> None:
    assert step_of(change, error).is_noise is is_noise


def test_a_gain_is_never_the_worst() -> None:
    text = Tokens("sampled", torch.zeros(1, 1, dtype=torch.int64), "d")
    steps = (step_of(-0.5, 0.01), step_of(0.02, 0.005), step_of(0.2, 0.15))
    assert Bisection("m", text, steps).worst is steps[1]


def test_one_window_gives_a_change_without_an_error(run, recipe) -> None:
    found = run(recipe(ROUND), text=Text(windows=1, tokens=24))
    assert found.steps[1].error is None
    assert "±" not in found.conclusion


def test_a_text_of_ones_own_is_read(run, recipe, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the river comes down from the hills " * 30)
    found = run(recipe(ROUND), text=Text(tmp_path / "a.txt", 2, 16))
    assert (found.text.name, found.text.ids.shape) == (str(tmp_path / "a.txt"), (2, 16))


def test_usual_windows_are_those_of_eval() -> None:
    assert (Text().count, Text().length) == (16, 128)
    assert (Text(Path("a")).count, Text(Path("a")).length) == (8, 1024)


def test_passes_come_from_the_cache_of_builds(run, recipe, tmp_path: Path) -> None:
    run(recipe(ROUND))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache/passes").rglob("*.safetensors")}
    assert kept
    run(recipe(ROUND))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize(
    ("text", "changes", "error", "said"),
    [
        (Text(Path("nowhere.txt")), {}, InputError, "there is no text nowhere.txt"),
        (Text(tokens=300), {}, InputError, "windows of 300 tokens were asked for, the engine takes 256"),
        (Text(tokens=40), {"export": [{"onnx": {"capacity": 32}}]}, InputError, "the engine takes 32"),
        (SHORT, {"export": [{"onnx": {"capacity": 1000}}]}, UnsupportedError, "capacity 1000"),
        (SHORT, {"passes": [{"round_to_nearest": {"scheme": "W4A16", "group_size": 48}}]}, PassError, "48"),
    ],
)
def test_what_cannot_be_done_is_told_before_any_work(
    run, recipe, monkeypatch: pytest.MonkeyPatch, text: Text, changes: dict, error: type[Exception], said: str
) -> None:
    def no_work(*_: object, **__: object) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(module, "sample_tokens", no_work)
    monkeypatch.setattr(module, "Yardstick", no_work)
    with pytest.raises(error, match=said):
        run(recipe(**changes), text=text)
