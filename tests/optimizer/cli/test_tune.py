"""`llmopt tune`: its table, the recipe of the best trial, studies that go on, and how it refuses."""

import builtins
import json
import sys
from pathlib import Path

import pytest

from llmopt.evaluation import tuning
from llmopt.optimizer.cli.main import main
from llmopt.optimizer.manifest import Manifest
from llmopt.optimizer.recipe import Recipe

GROUPS = "passes.0.round_to_nearest.group_size"
SCHEME = "passes.0.round_to_nearest.scheme"
LENIENT = {"metric": "kl", "max": 10, "windows": 2, "tokens": 32}


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> Path:
    settings = {
        "version": 1,
        "model": str(tiny_llama),
        "passes": [{"round_to_nearest": {"scheme": "W4A16", "group_size": 16}}],
        "export": [{"onnx": {"target": "cpu"}}],
        "verify": "none",
        "resources": {"threads": 1},
        "tune": {"search": {GROUPS: [16, 32]}, "constraint": LENIENT},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    return tmp_path / "recipe.yaml"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs the command; returns exit code, stdout and stderr."""

    def run_(*args: object, command: str = "tune") -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([command, *map(str, args)])
        shown = capsys.readouterr()
        return ended.value.code, shown.out, shown.err

    return run_


def result_of(shown: str) -> dict:
    return json.loads(shown.splitlines()[-1])["result"]


def test_the_best_recipe_is_named_and_builds_what_the_trial_was(run, recipe: Path, tmp_path: Path) -> None:
    code, shown, said = run(recipe, "-o", tmp_path / "study", "--keep", "-q")
    assert (code, said) == (0, "")
    best = tmp_path / "study/best.yaml"
    assert f"best: trial 1, {best}" in shown
    assert (tmp_path / "study/report.html").read_text().count("<circle") == 4
    found = Recipe.load(best)
    assert found.tune is None
    assert found.passes[0].instance.group_size == 32
    assert [gate.max for gate in found.accept] == [10]
    assert run(best, "-o", tmp_path / "again", "-q", command="build")[0] == 0
    trial, again = Manifest.load(tmp_path / "study/trials/1"), Manifest.load(tmp_path / "again")
    assert {name: entry.sha256 for name, entry in trial.files.items() if name.startswith("engine/")} == {
        name: entry.sha256 for name, entry in again.files.items() if name.startswith("engine/")
    }
    assert {found.name for found in (tmp_path / "study/trials").iterdir()} == {"0", "1"}


def test_paths_and_dollars_of_the_best_recipe_mean_what_they_meant(
    run, tiny_llama: Path, recipe: Path, tmp_path: Path
) -> None:
    settings = json.loads(recipe.read_text())
    (tmp_path / "models").mkdir()
    (tmp_path / "models/it ${x}").symlink_to(tiny_llama)
    (tmp_path / "held-out.txt").write_text("one two three four " * 400)
    settings["model"] = "models/it $${x}"
    settings["accept"] = [{"metric": "kl", "max": 10, "data": "held-out.txt", "windows": 1, "tokens": 16}]
    settings["tune"]["search"] = {GROUPS: [32]}
    recipe.write_text(json.dumps(settings))
    assert run(recipe, "-o", tmp_path / "a/study", "-q")[0] == 0
    best = Recipe.load(tmp_path / "a/study/best.yaml")
    assert (best.base / best.model).resolve() == tiny_llama.resolve()
    assert not Path(best.model).is_absolute()
    assert (best.base / best.accept[0].data).resolve() == tmp_path / "held-out.txt"
    assert len(best.accept) == 2


def test_a_study_that_was_killed_goes_on_and_builds_no_trial_twice(
    run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, built = tuning.build, []

    def killed_at_the_second(found: Recipe, *args, **options) -> Manifest:
        built.append(found.passes[0].instance.group_size)
        if len(built) == 2:
            raise KeyboardInterrupt
        return real(found, *args, **options)

    monkeypatch.setattr(tuning, "build", killed_at_the_second)
    args = (recipe, "-o", tmp_path / "study", "--json")
    assert run(*args)[0] == 130
    code, shown, _ = run(*args)
    assert code == 0
    assert built == [16, 32, 32]
    assert [trial["values"][GROUPS] for trial in result_of(shown)["trials"]] == [16, 32]
    assert run(*args, "--force")[0] == 0
    assert built == [16, 32, 32, 16, 32]


def test_ranges_are_sampled_and_more_trials_go_on(run, recipe: Path, tmp_path: Path) -> None:
    search = ("--search", f"{SCHEME}=W4A16,W8A16", "--search", "seed={min: 0, max: 1000}")
    args = (recipe, "-o", tmp_path / "study", "--json", *search)
    first = result_of(run(*args, "--trials", 1)[1])["trials"]
    second = result_of(run(*args, "--trials", 3)[1])["trials"]
    assert len(second) == 3
    assert second[:1] == first
    assert all(0 <= trial["values"]["seed"] <= 1000 for trial in second)


def test_a_limit_that_no_trial_meets_ends_with_4_and_the_nearest(run, recipe: Path, tmp_path: Path) -> None:
    strict = ("--set", "tune.constraint.max=0.000000001")
    code, shown, error = run(recipe, "-o", tmp_path / "study", *strict, "-q")
    assert code == 4
    assert "rejected: kl" in shown
    assert "none of 2 trials met every limit; trial 0 came nearest: kl " in error
    assert [found.name for found in (tmp_path / "study/trials").iterdir()] == ["0"]
    assert "of the trials met every limit" in (tmp_path / "study/report.html").read_text()
    assert not (tmp_path / "study/best.yaml").exists()


def test_trials_that_cannot_be_built_are_told(run, recipe: Path, tmp_path: Path) -> None:
    code, shown, error = run(recipe, "-o", tmp_path / "study", "--set", f"tune.search={{{GROUPS}: [48]}}", "-q")
    assert code == 3
    assert "failed: " in shown
    assert "none of 1 trials could be built; trial 0: " in error


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--set", "tune="], "no option is searched"),
        (["--search", GROUPS.replace("group", "gruop") + "=16"], "did you mean 'group_size'?"),
        (["--search", "seed"], "--search:1: 'seed' is not PATH=VALUES"),
        (["--search", "seed={min: 2, max: 1}"], "min 2 is not below max 1"),
        (["--search", "seed=[1"], "--search:1: seed: "),
        (["--search", "seed=1,1"], "seed has a value twice"),
        (["--trials", "0"], "0 is not in the range x>=1"),
        (["--objective", "beauty"], "'beauty' is not one of"),
    ],
)
def test_mistakes_are_told_before_any_work(run, recipe: Path, tmp_path: Path, args: list[str], said: str) -> None:
    code, shown, error = run(recipe, "-o", tmp_path / "study", *args)
    assert (code, shown) == (2, "")
    assert said in error
    assert not (tmp_path / "study").exists()


def test_another_directory_is_left_alone_even_by_force(run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/it.txt").write_text("kept")
    code, _, error = run(recipe, "-o", tmp_path / "mine", "--force")
    assert code == 2
    assert "is no study of llmopt tune" in error
    assert (tmp_path / "mine/it.txt").read_text() == "kept"


def test_a_missing_optuna_is_told_with_the_extra(
    run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args, **options):
        if name.partition(".")[0] == "optuna":
            raise ModuleNotFoundError(name=name)
        return real(name, *args, **options)

    monkeypatch.delitem(sys.modules, "optuna", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    code, _, error = run(recipe, "-o", tmp_path / "study")
    assert code == 5
    assert "pip install 'llmopt[tune]'" in error
