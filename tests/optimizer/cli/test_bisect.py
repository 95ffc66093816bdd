"""`llmopt bisect`: the table, its files, and mistakes told before any work."""

import json
import re
from pathlib import Path

import pytest

from llmopt.optimizer.cli.main import main
from llmopt.optimizer.target import TARGETS


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> Path:
    settings = {
        "version": 1,
        "model": str(tiny_llama),
        "passes": [{"round_to_nearest": {"scheme": "W8A8"}}],
        "export": [{"onnx": {"target": "cpu"}}],
        "resources": {"threads": 1},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    return tmp_path / "recipe.yaml"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs the command; returns exit code, stdout and stderr."""

    def run_(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["bisect", *map(str, args)])
        shown = capsys.readouterr()
        return ended.value.code, shown.out, shown.err

    return run_


def test_every_step_has_a_row_and_the_worst_is_named_last(run, recipe: Path, tmp_path: Path) -> None:
    code, shown, said = run(recipe, "--windows", 3, "--tokens", 24, "--json", tmp_path / "it.json")
    assert code == 0
    names = [row[1] for line in shown.splitlines() if (row := re.match(r" *(\w+(?: \w+)?) +[\d.]+ +[\d.]+% ", line))]
    facts = json.loads((tmp_path / "it.json").read_text())
    assert [step["name"] for step in facts["steps"]] == [
        "source model", "round_to_nearest", "standard graph", *TARGETS["cpu"].with_kernels().graph_passes,
    ]  # fmt: skip
    assert facts["worst"] == "round_to_nearest"
    assert facts["text"]["windows"] == 3
    assert names == [step["name"] for step in facts["steps"]]
    assert shown.splitlines()[-1].startswith("round_to_nearest costs most: 0.0")
    assert "measure round_to_nearest: " in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it.json", "llmopt-cache", "recipe.yaml"]


def test_quiet_says_nothing_while_it_works(run, recipe: Path) -> None:
    code, shown, said = run(recipe, "--windows", 1, "--tokens", 8, "-q")
    assert (code, said) == (0, "")
    assert "round_to_nearest" in shown


def test_set_changes_the_recipe(run, recipe: Path, tmp_path: Path) -> None:
    args = ("--windows", 2, "--tokens", 16, "--json", tmp_path / "it.json")
    run(
        recipe,
        "--set",
        "passes.0.round_to_nearest.scheme=W4A16",
        "--set",
        "passes.0.round_to_nearest.group_size=32",
        *args,
    )
    coarse = json.loads((tmp_path / "it.json").read_text())["steps"][1]["kl"]
    run(recipe, *args)
    assert coarse > 5 * json.loads((tmp_path / "it.json").read_text())["steps"][1]["kl"]


def test_html_is_written(run, recipe: Path, tmp_path: Path) -> None:
    assert run(recipe, "--windows", 1, "--tokens", 8, "--html", tmp_path / "it.html")[0] == 0
    assert "share_weights" in (tmp_path / "it.html").read_text()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--json", "none/it.json"], "none is no directory"),
        (["--html", "."], ". is a directory"),
        (["--data", "none.txt"], "there is no text none.txt"),
        (["--tokens", "257"], "windows of 257 tokens were asked for, the engine takes 256"),
        (["--windows", "0"], "0 is not in the range x>=1"),
        (["--tokens", "1"], "1 is not in the range x>=2"),
        (["--set", "passes.0.round_to_nearest.scheme=W5A5"], "W5A5"),
    ],
)
def test_mistakes_are_told_before_any_work(
    run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, shown, error = run(recipe, *args)
    assert (code, shown) == (2, "")
    assert said in error
    assert not (tmp_path / "llmopt-cache/passes").exists()
    assert not (tmp_path / "llmopt-cache/samples").exists()


def test_a_recipe_that_is_not_there_is_told(run, tmp_path: Path) -> None:
    code, _, error = run(tmp_path / "none.yaml")
    assert code == 2
    assert "there is no recipe" in error
