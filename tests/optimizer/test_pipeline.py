"""Passes in order, each from the cache when it ran on the same input before."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from llmopt.calibration.same_function import verify_same_function
from llmopt.optimizer import pipeline
from llmopt.optimizer.contracts import WeightPass
from llmopt.optimizer.errors import PassError, UnsupportedError, VerificationError
from llmopt.optimizer.model import DenseWeight, Model
from llmopt.optimizer.pipeline import each_pass, run_passes
from llmopt.optimizer.progress import Silent
from llmopt.optimizer.recipe import NamedPass, Recipe
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens
from llmopt.passes.rescale import Rescale
from llmopt.passes.rotate import Rotate

NORM = "model.norm.weight"
CALLS: list[str] = []
"""Which passes ran, as name and factor."""

NOTE = '''"""Adds a note."""

from llmopt.optimizer.contracts import WeightPass

__all__ = ["Note"]


class Note(WeightPass):
    def run(self, model, context):
        context.note("one")
        return model
'''


class Scale(WeightPass):
    """Multiplies the last norm."""

    factor: float = 2.0
    keep: bool = True

    def run(self, model, context):
        CALLS.append(f"scale {self.factor:g}")
        changed = {NORM: DenseWeight.of(model.weights[NORM].dense() * self.factor)}
        return model.with_weights(context.keep(changed) if self.keep else changed)


class Talk(WeightPass):
    """Changes nothing, says something."""

    def run(self, model, context):
        CALLS.append("talk")
        context.note("it is late")
        context.fallback("half of it")
        context.detail("errors", {"lm_head": 0.5})
        context.progress(1, 2)
        return model


class Fail(WeightPass):
    """Raises the error called ``kind`` after some work, as long as ``CALLS`` is empty."""

    kind: str

    def run(self, model, context):
        context.keep({NORM: model.weights[NORM]})
        errors = {
            "crash": ValueError("no such thing"), "refused": UnsupportedError("no norm here"),
            "interrupt": KeyboardInterrupt(), "disk": OSError(28, "No space left on device"),
            "memory": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        }  # fmt: skip
        if not CALLS:
            raise errors[self.kind]
        return model


class KeepTwice(WeightPass):
    """Keeps a weight, and returns another one under its name."""

    def run(self, model, context):
        context.keep({NORM: DenseWeight.of(torch.zeros(64))})
        return model.with_weights({NORM: DenseWeight.of(torch.ones(64))})


class Lose(WeightPass):
    """Returns a model that lacks something."""

    what: str

    def run(self, model, context):
        if self.what == "weight":
            return replace(model, weights={name: w for name, w in model.weights.items() if name != NORM})
        return replace(model, config={**model.config, "rms_norm_eps": 1.0})


class Claim(Scale):
    """Says of any factor that the function stays the same."""

    keeps_function = True


class NeedsOnes(WeightPass):
    """Only takes a model whose last norm is one."""

    def requires(self, model):
        if not torch.equal(model.weights[NORM].dense(), torch.ones(64)):
            raise PassError("the last norm is not one")

    def run(self, model, context):
        CALLS.append("needs_ones")
        return model


class Read(WeightPass):
    """Says how many tokens of calibration text it was given."""

    needs_calibration = True

    def run(self, model, context):
        CALLS.append("read")
        context.detail("tokens", context.calibration().count)
        return model


class ReadUnasked(WeightPass):
    """Reads calibration text without saying that it needs some."""

    def run(self, model, context):
        context.calibration()
        return model


class ByLayers(WeightPass):
    """Leaves a finished layer in its work directory, and is killed before the second one."""

    def run(self, model, context):
        if not (context.work / "0").exists():
            (context.work / "0").write_text("done")
            CALLS.append("layer 0")
            raise KeyboardInterrupt
        CALLS.append("layer 1")
        return model


@dataclass(frozen=True)
class SomeText:
    """Calibration text of a name."""

    digest: str

    def tokens(self) -> Tokens:
        return Tokens("some.txt", torch.zeros(2, 3, dtype=torch.int64), self.digest, lengths=torch.tensor([3, 1]))


@pytest.fixture(autouse=True)
def _no_calls() -> Iterator[None]:
    CALLS.clear()
    yield
    CALLS.clear()


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Model:
    return load_model(str(tiny_llama), cache=tmp_path / "cache")


@pytest.fixture
def run(model: Model, tmp_path: Path):
    """Runs passes on the tiny model; keywords change the recipe."""

    def run_(*passes: WeightPass, progress=None, model: Model = model, calibration=None, **changes):
        steps = tuple(NamedPass(type(each).__name__.lower(), each) for each in passes)
        recipe = Recipe(version=1, model="m", passes=steps, export=(), base=tmp_path, **changes)
        return run_passes(
            model,
            recipe,
            cache=tmp_path / "cache",
            progress=progress or Silent(),
            verifier=verify_same_function,
            calibration=calibration,
        )

    return run_


@pytest.fixture
def entries(tmp_path: Path):
    """The directories of finished passes, and whatever else lies among them but locks."""
    return lambda: [path for path in (tmp_path / "cache/passes").iterdir() if path.suffix != ".lock"]


def test_passes_run_in_order_on_what_the_one_before_returned(run, model: Model) -> None:
    result, records = run(Scale(factor=2), Scale(factor=5))
    assert CALLS == ["scale 2", "scale 5"]
    assert torch.equal(result.weights[NORM].dense(), model.weights[NORM].dense() * 2 * 5)
    assert [(each.name, each.options, each.changed) for each in records] == [
        ("scale", {"factor": 2.0, "keep": True}, True),
        ("scale", {"factor": 5.0, "keep": True}, True),
    ]


def test_the_input_model_is_left_alone_and_shared(run, model: Model) -> None:
    before = {name: weight.dense().clone() for name, weight in model.weights.items()}
    result, _ = run(Scale())
    assert all(torch.equal(model.weights[name].dense(), value) for name, value in before.items())
    assert [name for name in before if result.weights[name] is not model.weights[name]] == [NORM]


def test_weights_that_a_pass_did_not_keep_are_kept_for_it(run, model: Model) -> None:
    for _ in range(2):
        result, _ = run(Scale(keep=False))
        assert torch.equal(result.weights[NORM].dense(), model.weights[NORM].dense() * 2)
    assert CALLS == ["scale 2"]


def test_what_a_pass_returns_counts_more_than_what_it_kept(run) -> None:
    result, _ = run(KeepTwice())
    assert torch.equal(result.weights[NORM].dense(), torch.ones(64))


def test_each_pass_runs_when_the_model_behind_it_is_asked_for(model: Model, tmp_path: Path) -> None:
    steps = tuple(NamedPass("scale", Scale(factor=factor)) for factor in (2, 5))
    recipe = Recipe(version=1, model="m", passes=steps, export=(), base=tmp_path)
    cache = tmp_path / "cache"
    behind = each_pass(model, recipe, cache=cache, progress=Silent(), verifier=verify_same_function)
    assert CALLS == []
    first, record = next(behind)
    assert CALLS == ["scale 2"]
    assert (record.name, record.options["factor"]) == ("scale", 2.0)
    [(second, _)] = behind
    expected = model.weights[NORM].dense()
    assert torch.equal(first.weights[NORM].dense(), expected * 2)
    assert torch.equal(second.weights[NORM].dense(), expected * 2 * 5)


def test_what_was_done_to_linears_is_known_behind_every_pass_also_from_the_cache(run) -> None:
    passes = (Talk(), Rescale(), Scale(), Rotate(online={"down_proj": 32}))
    module = "model.layers.1.mlp.up_proj"
    weight = torch.eye(128, 64, dtype=torch.float64)
    expected = run(*passes[1:])[0].bases[module].linear(weight)[0]
    for _ in range(2):
        result, _ = run(*passes)
        assert len(result.bases[module].columns) == 3
        torch.testing.assert_close(result.bases[module].linear(weight)[0], expected, rtol=0, atol=1e-12)


def test_a_second_run_runs_nothing_and_says_the_same(run) -> None:
    first, records = run(Scale(), Talk())
    assert CALLS == ["scale 2", "talk"]
    second, again = run(Scale(), Talk())
    assert CALLS == ["scale 2", "talk"]
    assert again == records
    assert torch.equal(second.weights[NORM].dense(), first.weights[NORM].dense())


def test_a_changed_option_runs_again_from_there(run) -> None:
    run(Scale(factor=2), Scale(factor=3), Scale(factor=4))
    CALLS.clear()
    run(Scale(factor=2), Scale(factor=7), Scale(factor=4))
    assert CALLS == ["scale 7", "scale 4"]
    CALLS.clear()
    run(Scale(factor=2), Scale(factor=3), Scale(factor=4), Scale(factor=5))
    assert CALLS == ["scale 5"]


@pytest.mark.parametrize("changes", [{"seed": 1}, {"verify": "full"}])
def test_what_decides_about_a_result_runs_it_again(run, changes: dict[str, object]) -> None:
    run(Scale())
    run(Scale(), **changes)
    assert CALLS == ["scale 2", "scale 2"]


def test_another_source_model_runs_it_again(run, model: Model) -> None:
    run(Scale())
    run(Scale(), model=replace(model, source=replace(model.source, digest="0" * 64)))
    assert CALLS == ["scale 2", "scale 2"]


class Reads(Scale):
    """Depends on a file."""

    path: Path

    @property
    def files(self):
        return (self.path,)


def test_a_pass_depends_on_what_is_in_its_files_and_not_on_when_they_were_written(run, tmp_path: Path) -> None:
    file = tmp_path / "adapter"
    for text in ("one", "two", "one"):
        file.write_text(text)
        run(Reads(path=file))
    assert CALLS == ["scale 2", "scale 2"]


def test_changed_sources_run_everything_again(run, monkeypatch: pytest.MonkeyPatch) -> None:
    run(Scale(), Talk())
    monkeypatch.setattr(pipeline, "sources_digest", lambda: "another compiler")
    run(Scale(), Talk())
    assert CALLS == ["scale 2", "talk"] * 2


def test_another_kind_of_cpu_runs_everything_again(run, monkeypatch: pytest.MonkeyPatch) -> None:
    run(Scale())
    flags = torch.cpu.get_capabilities()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**flags, "amx_bf16": not flags.get("amx_bf16")})
    run(Scale())
    assert CALLS == ["scale 2"] * 2


def test_a_pass_of_another_distribution_runs_again_when_its_file_changed(
    run, install_pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmopt.optimizer import loader

    folder = install_pass("noted", NOTE)
    note = loader.load("passes", "noted")()
    assert run(note)[1][0].notes == ["one"]
    file = next(folder.glob("*.py"))
    file.write_text(NOTE.replace("one", "two"))
    calls = []
    monkeypatch.setattr(type(note), "run", lambda self, model, context: calls.append("ran") or model)
    run(note)
    assert calls == ["ran"]


def test_only_a_pass_that_reads_text_depends_on_it(run) -> None:
    _, (_, record) = run(Scale(), Read(), calibration=SomeText("a"))
    assert record.details == {"tokens": 4}
    run(Scale(), Read(), calibration=SomeText("a"))
    assert CALLS == ["scale 2", "read"]
    run(Scale(), Read(), calibration=SomeText("b"))
    assert CALLS == ["scale 2", "read", "read"]


def test_without_text_a_pass_that_needs_some_is_refused(run) -> None:
    with pytest.raises(PassError, match="read looks at calibration text, and there is none"):
        run(Read())


def test_a_pass_that_does_not_say_it_reads_text_is_given_none(run) -> None:
    with pytest.raises(PassError, match="asked for calibration text") as caught:
        run(ReadUnasked(), calibration=SomeText("a"))
    assert "needs_calibration" in caught.value.hint


def test_a_killed_pass_finds_its_finished_layers_again_and_says_so(run, entries, capsys) -> None:
    from llmopt.optimizer.progress import Lines

    with pytest.raises(KeyboardInterrupt):
        run(ByLayers(), progress=Lines())
    assert [path.suffix for path in entries()] == [".work"]
    run(Scale(), progress=Lines())
    assert "goes on" not in capsys.readouterr().err
    run(ByLayers(), progress=Lines())
    assert "bylayers: goes on from what a build that was interrupted had finished" in capsys.readouterr().err
    assert CALLS == ["layer 0", "scale 2", "layer 1"]
    assert [path for path in entries() if path.suffix == ".work"] == []


def test_records_hold_what_a_pass_said(run) -> None:
    _, (record,) = run(Talk())
    assert (record.changed, record.notes, record.fallbacks) == (False, ["it is late"], ["half of it"])
    assert record.details == {"errors": {"lm_head": 0.5}}


def test_notes_and_fallbacks_are_told_also_when_they_come_from_the_cache(run, capsys) -> None:
    from llmopt.optimizer.progress import JsonLines

    for _ in range(2):
        run(Talk(), progress=JsonLines(interval=0))
        told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [each["text"] for each in told if each["event"] == "note"] == ["talk: half of it", "talk: it is late"]
    assert CALLS == ["talk"]


def test_under_strict_a_fallback_is_an_error(run, entries) -> None:
    with pytest.raises(PassError, match="talk: half of it") as caught:
        run(Talk(), strict=True)
    assert caught.value.exit_code == 3
    assert "strict: true" in caught.value.hint
    assert entries() == []


def test_under_strict_a_fallback_is_an_error_also_when_it_comes_from_the_cache(run) -> None:
    run(Talk())
    with pytest.raises(PassError, match="talk: half of it"):
        run(Talk(), strict=True)
    run(Talk())
    assert CALLS == ["talk"]


def test_strict_takes_results_without_a_fallback_from_the_cache(run) -> None:
    run(Scale())
    run(Scale(), strict=True)
    assert CALLS == ["scale 2"]


def test_a_crash_names_the_pass_and_is_called_its_bug(run, entries) -> None:
    with pytest.raises(PassError, match="fail crashed: ValueError: no such thing; this is a bug in the pass") as caught:
        run(Fail(kind="crash"))
    assert isinstance(caught.value.__cause__, ValueError)
    assert entries() == []


@pytest.mark.parametrize(
    ("kind", "error"),
    [("refused", UnsupportedError), ("interrupt", KeyboardInterrupt), ("disk", OSError), ("memory", RuntimeError)],
)
def test_what_is_no_bug_of_the_pass_goes_through(run, entries, kind: str, error: type[BaseException]) -> None:
    with pytest.raises(error) as caught:
        run(Fail(kind=kind))
    assert not isinstance(caught.value, PassError)
    assert entries() == []


def test_after_a_failure_the_finished_passes_are_not_run_again(run, entries) -> None:
    with pytest.raises(PassError):
        run(Scale(factor=2), NeedsOnes())
    assert CALLS == ["scale 2"]
    CALLS.clear()
    with pytest.raises(OSError):
        run(Scale(factor=2), Fail(kind="disk"))
    assert len(entries()) == 1
    CALLS.append("go")
    run(Scale(factor=2), Fail(kind="disk"))
    assert CALLS == ["go"]


def test_a_pass_is_asked_whether_it_takes_the_model_it_will_get(run, model: Model) -> None:
    with pytest.raises(PassError, match="last norm is not one"):
        run(NeedsOnes())
    run(KeepTwice(), NeedsOnes())
    assert CALLS == ["needs_ones"]


@pytest.mark.parametrize(("what", "said"), [("weight", f"removed {NORM}"), ("config", "changed the model's config")])
def test_what_would_be_lost_between_passes_is_refused(run, entries, what: str, said: str) -> None:
    with pytest.raises(PassError, match=f"lose {said}"):
        run(Lose(what=what))
    assert entries() == []


@pytest.mark.parametrize("keep", [True, False])
def test_a_pass_that_only_claims_to_keep_the_function_is_found_out_and_leaves_nothing(run, entries, keep: bool) -> None:
    with pytest.raises(VerificationError, match="claim changes what the model computes: embedding and head"):
        run(Claim(factor=1.01, keep=keep))
    assert entries() == []
    run(Claim(factor=1.01, keep=keep), verify="none")


def test_how_far_the_model_behind_a_pass_is_from_the_one_before_is_recorded(run) -> None:
    for _ in range(2):
        _, (record, other) = run(Claim(factor=1), Scale(factor=1))
        assert list(record.details["verification"].values()) == [0.0] * 4
        assert other.details == {}
    assert CALLS == ["scale 1", "scale 1"]


@pytest.mark.parametrize("name", ["record.json", "weights.json", "00000.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "empty", "garbage"])
def test_a_damaged_result_is_made_again(run, entries, name: str, damage: str) -> None:
    expected, _ = run(Scale())
    wanted = expected.weights[NORM].dense().clone()
    (directory,) = entries()
    path = directory / name
    path.unlink()
    if damage != "gone":
        path.write_bytes(b"" if damage == "empty" else b"\xff" * 100)
    result, _ = run(Scale())
    assert CALLS == ["scale 2", "scale 2"]
    assert torch.equal(result.weights[NORM].dense(), wanted)


def test_what_a_killed_pass_left_is_removed_when_it_runs_again(run, entries) -> None:
    run(Scale())
    (directory,) = entries()
    directory.rename(directory.with_name(f".{directory.name}.partial"))
    run(Scale())
    assert CALLS == ["scale 2", "scale 2"]
    assert [path.name for path in entries()] == [directory.name]
