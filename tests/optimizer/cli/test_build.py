"""`llmopt build`: what it prints, how it exits, and that nothing half-written is left whatever happens to it."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmopt.optimizer.cli.main import main
from llmopt.optimizer.manifest import Manifest

DATA = Path(__file__).parents[2] / "data"
IMPOSSIBLE = {"metric": "top1", "min": 1, "windows": 2, "tokens": 32}
COARSE = [{"round_to_nearest": {"scheme": "W4A16", "group_size": 64}}]

COUNT = '''"""Leaves a line in a file each time it runs."""

from pathlib import Path

from llmopt.optimizer.contracts import WeightPass

__all__ = ["Count"]


class Count(WeightPass):
    log: str

    def run(self, model, context):
        with Path(self.log).open("a") as file:
            file.write("ran\\n")
        return model
'''

STALL = '''"""Keeps a weight, and then stands still where the environment says so."""

import os
import time

from llmopt.optimizer.contracts import WeightPass

__all__ = ["Stall"]


class Stall(WeightPass):
    def run(self, model, context):
        context.keep({"model.norm.weight": model.weights["model.norm.weight"]})
        if "STALL" in os.environ:
            print("stalled", flush=True)
            time.sleep(60)
        return model
'''

CRASH = '''"""Has a bug."""

from llmopt.optimizer.contracts import WeightPass

__all__ = ["Crash"]


class Crash(WeightPass):
    def run(self, model, context):
        raise ValueError("shapes differ")
'''

STALLED_EXPORT = """
import time
import onnx_ir
from llmopt.optimizer.cli.main import main
save = onnx_ir.save
def stall(*args, **options):
    save(*args, **options)
    print("stalled", flush=True)
    time.sleep(60)
onnx_ir.save = stall
main()
"""

PLAIN = "from llmopt.optimizer.cli.main import main; main()"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*args: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in args])
    return ended.value.code


def unfinished(folder: Path) -> list[Path]:
    """What a build or a pass wrote and did not finish."""
    return [*folder.rglob(".*.partial"), *folder.rglob(".*.replaced")]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond ``size`` bytes fails with EFBIG, as writing to a full disk does with ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def started(code: str, *args: str | Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """``llmopt`` in a process of its own that has come to where it stands still."""
    command = [sys.executable, "-c", code, *map(str, args)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
        try:
            assert process.stdout.readline() == "stalled\n"
            yield process
        finally:
            process.kill()


def test_a_build_goes_to_out_and_the_recipes_name(recipe_of, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", recipe_of("my-model.yaml")) == 0
    assert Manifest.load(Path("out/my-model"), verify=True).verdict.status == "accepted"
    shown = capsys.readouterr()
    assert "gates: accepted" in shown.out
    steps = ", ".join(rf"{step} \d\.\d\d" for step in ("load_model", "texts", "passes", "export", "measure"))
    assert re.search(rf"^peak memory: \d\.\d\d GB resident \({steps}\)$", shown.out, re.MULTILINE)
    assert shown.out.endswith("out/my-model: 0.2 MB, accepted\nnext: llmopt chat out/my-model\n")
    assert [line.split(":")[0] for line in shown.err.splitlines()] == [
        "texts",
        "round_to_nearest",
        "export onnx",
        "measure",
    ]


def test_names_are_printed_as_they_are(recipe_of, capsys: pytest.CaptureFixture[str]) -> None:
    Path("[red]text.txt").write_text("The miller saw the fox and the clock. " * 20)
    gate = {"metric": "kl", "max": 9, "windows": 2, "tokens": 16, "data": "[red]text.txt"}
    output = f"out/[bold]:fox:{'x' * 100}"
    assert run("build", recipe_of(accept=[gate]), "-o", output) == 0
    shown = capsys.readouterr().out
    assert f"{output}: 0.2 MB, accepted\n" in shown
    assert "kl on [red]text.txt" in shown
    assert run("inspect", output) == 0
    assert "kl on [red]text.txt" in capsys.readouterr().out


def test_quiet_prints_the_result_only(recipe_of, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", recipe_of(), "-o", "it", "--quiet") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "it: 0.2 MB, accepted" in shown.out


def test_json_prints_events_and_the_result_last(recipe_of, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", recipe_of(), "-o", "it", "--json") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    events = [json.loads(line) for line in shown.out.splitlines()]
    assert [each["event"] for each in events].count("result") == 1
    assert {each["step"] for each in events if each["event"] == "finished"} >= {"round_to_nearest", "export onnx"}
    assert any(each["event"] == "note" and each["text"].startswith("peak memory: ") for each in events)
    result = events[-1]["result"]
    assert result.pop("output") == "it"
    assert Manifest.model_validate(result) == Manifest.load(Path("it"))


def test_set_changes_an_option(recipe_of) -> None:
    change = "passes.0.round_to_nearest.head=none"
    assert run("build", recipe_of(), "-o", "it", "--set", change, "--set", "seed=5", "-q") == 0
    manifest = Manifest.load(Path("it"))
    assert manifest.recipe["seed"] == 5
    assert (manifest.layers[0].scheme, manifest.layers[-1].scheme) == ("W8A8", "float32")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_missed_gate_exits_with_4_and_the_build_exists(
    recipe_of, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(passes=COARSE, accept=[IMPOSSIBLE])
    assert run("build", recipe, "-o", "it", *(["--json"] if as_json else [])) == 4
    shown = capsys.readouterr().out
    assert Manifest.load(Path("it"), verify=True).verdict.status == "rejected"
    if as_json:
        assert json.loads(shown.splitlines()[-1])["result"]["verdict"]["status"] == "rejected"
    else:
        assert "gates: rejected" in shown
        assert re.search(r"\nit: 0\.\d MB, rejected\n$", shown)


def test_a_rejected_build_does_not_answer_without_force(recipe_of, capsys: pytest.CaptureFixture[str]) -> None:
    run("build", recipe_of(passes=COARSE, accept=[IMPOSSIBLE]), "-o", "it")
    capsys.readouterr()
    assert run("generate", "it", "--prompt", "hello") == 4
    assert "it was rejected when it was built: top1 is 0." in capsys.readouterr().err


def test_three_mistakes_are_three_lines_with_their_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", DATA / "three-mistakes.yaml") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "error: the recipe has 3 mistakes"
    places = [line.removeprefix(f"{DATA / 'three-mistakes.yaml'}:").split(": ")[:2] for line in lines[:-1]]
    assert places == [
        ["7", "passes.0.round_to_nearest.gruop_size"],
        ["9", "export.0"],
        ["10", "seed"],
    ]
    assert list(Path().iterdir()) == []


def test_a_recipe_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", "nowhere.yaml") == 2
    assert capsys.readouterr().err.startswith("error: there is no recipe nowhere.yaml\nhint: ")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def rename_architecture(config: Path) -> None:
    config.write_text(config.read_text().replace("LlamaForCausalLM", "UnheardOfForCausalLM"))


@pytest.mark.parametrize(
    ("file", "damage", "code", "said"),
    [
        ("model.safetensors", Path.unlink, 2, "has neither model.safetensors nor model.safetensors.index.json"),
        ("model.safetensors", truncate, 2, "is truncated or not a safetensors file"),
        ("model.safetensors", lambda path: path.write_bytes(b""), 2, "is truncated or not a safetensors file"),
        ("config.json", Path.unlink, 2, "config.json"),
        ("config.json", lambda path: path.write_text("{"), 2, "config.json"),
        ("config.json", rename_architecture, 5, "UnheardOfForCausalLM"),
        ("tokenizer.json", truncate, 2, "tokenizer.json"),
    ],
)
def test_a_model_that_cannot_be_read_is_told_and_nothing_is_written(
    recipe_of, tiny_llama: Path, file: str, damage, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_llama, "model")
    damage(Path("model") / file)
    assert run("build", recipe_of(model="./model")) == code
    shown = capsys.readouterr().err
    assert said in shown
    assert "hint: " in shown
    assert "bug" not in shown
    assert not Path("out").exists()
    assert unfinished(Path()) == []


def test_a_crash_of_a_pass_exits_with_3_and_names_it(
    recipe_of, install_pass, capsys: pytest.CaptureFixture[str]
) -> None:
    install_pass("crash", CRASH)
    assert run("build", recipe_of(passes=["crash"])) == 3
    assert "error: crash crashed: ValueError: shapes differ; this is a bug in the pass\n" in capsys.readouterr().err
    assert not Path("out").exists()
    assert unfinished(Path()) == []


def test_an_existing_output_is_refused_without_force(recipe_of, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", recipe_of(), "-o", "it", "-q") == 0
    before = Path("it/build-record.json").read_bytes()
    capsys.readouterr()
    assert run("build", recipe_of(), "-o", "it") == 2
    expected = "error: it exists\nhint: --force replaces it, or name another directory with -o\n"
    assert capsys.readouterr().err == expected
    assert Path("it/build-record.json").read_bytes() == before
    assert run("build", recipe_of(), "-o", "it", "--force", "-q") == 0
    assert Path("it/build-record.json").read_bytes() != before


def test_an_output_that_cannot_be_made_is_told(recipe_of, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("x")
    assert run("build", recipe_of(), "-o", "file/it") == 2
    assert "error: cannot use " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "said", "kept"),
    [
        # The head's integers take 33 kB, the tokenizer before them 22 kB, the engine after them 166 kB.
        pytest.param(30_000, "the file system allows no file this large while writing", 0, id="in a pass"),
        pytest.param(50_000, "the disk is full", 1, id="in the export"),
    ],
)
def test_a_full_disk_exits_with_7_and_the_next_build_continues(
    recipe_of, size: int, said: str, kept: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of()
    with files_of_at_most(size):
        assert run("build", recipe) == 7
    shown = capsys.readouterr().err
    assert f"error: {said}" in shown
    assert "hint: make room" in shown
    assert not Path("out").exists()
    assert unfinished(tmp_path) == []
    passes = tmp_path / "llmopt-cache/passes"
    assert len([path for path in passes.iterdir() if path.is_dir()]) == kept
    assert run("build", recipe) == 0
    assert len([path for path in passes.iterdir() if path.is_dir()]) == 1
    assert Manifest.load(Path("out/recipe"), verify=True)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, PLAIN), (signal.SIGTERM, STALLED_EXPORT)], ids=["in a pass", "in the export"]
)
def test_an_interrupted_build_leaves_nothing(
    recipe_of, install_pass, number: signal.Signals, code: str, tmp_path: Path
) -> None:
    site = install_pass("stall", STALL)
    recipe = recipe_of(passes=["stall"] if code == PLAIN else [])
    environment = {"PYTHONPATH": str(site), "STALL": "1"}
    with started(code, "build", recipe, "-o", "deep/it", **environment) as process:
        assert len(unfinished(tmp_path / "deep")) == 1
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.endswith("interrupted\n")
    assert not (tmp_path / "deep").exists()
    assert unfinished(tmp_path) == []


def test_a_killed_build_continues_behind_its_last_finished_pass(recipe_of, install_pass, tmp_path: Path) -> None:
    install_pass("count", COUNT)
    site = install_pass("stall", STALL)
    recipe = recipe_of(passes=[{"count": {"log": str(tmp_path / "log")}}, "stall"])
    with started(PLAIN, "build", recipe, "-o", "out/it", PYTHONPATH=str(site), STALL="1") as process:
        process.kill()
        process.wait(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out/it").exists()
    assert len(unfinished(tmp_path)) == 2
    assert run("build", recipe, "-o", "out/it") == 0
    assert (tmp_path / "log").read_text() == "ran\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["it"]
    assert unfinished(tmp_path) == []
    assert Manifest.load(tmp_path / "out/it", verify=True)


def test_a_second_build_of_one_output_fails_at_once(
    recipe_of, install_pass, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = install_pass("stall", STALL)
    recipe = recipe_of(passes=["stall"])
    with started(PLAIN, "build", recipe, "-o", "it", PYTHONPATH=str(site), STALL="1"):
        assert run("build", recipe, "-o", "it") == 2
    expected = "error: another build is writing it\nhint: wait for it, or use another directory\n"
    assert capsys.readouterr().err == expected


def test_memory_too_little_for_the_libraries_exits_with_7_before_anything_is_read(recipe_of, tmp_path: Path) -> None:
    """Further on ONNX Runtime would end the process where it cannot start a thread."""
    recipe = recipe_of(resources={"threads": 1, "max_ram_gb": 0.1})
    command = [sys.executable, "-c", PLAIN, "build", str(recipe)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 7
    error = r"error: resources\.max_ram_gb: 0\.1 is too little: the libraries of a build alone take 0\.\d\d GB\n"
    assert re.search(error, result.stderr)
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
    assert unfinished(tmp_path) == []
