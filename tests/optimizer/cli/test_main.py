"""The command itself: what it prints and how it exits, for every way a command can end."""

import errno
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import click
import pytest

from llmopt.optimizer.cli import main as main_module
from llmopt.optimizer.cli.main import cli, main
from llmopt.optimizer.errors import (
    InputError,
    LlmoptError,
    PassError,
    Problem,
    RecipeError,
    RejectedError,
    ResourceError,
    UnsupportedError,
    VerificationError,
)

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "onnx_ir", "numpy", "pydantic", "rich")


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(args)
    return ended.value.code


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Make ``llmopt test`` do something."""

    def command_(body) -> None:
        fake = click.Command("test", callback=body)
        original = main_module.importlib.import_module
        monkeypatch.setattr(
            main_module.importlib,
            "import_module",
            lambda name: type("M", (), {"command": fake}) if name.endswith("cli.test") else original(name),
        )
        known = type(cli).list_commands
        monkeypatch.setattr(type(cli), "list_commands", lambda self, ctx: [*known(self, ctx), "test"])

    return command_


@pytest.fixture
def failing(command):
    def failing_(error: BaseException) -> int:
        def body() -> None:
            raise error

        command(body)
        return run("test")

    return failing_


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_help_imports_nothing_heavy_and_shows_every_command_with_its_sentence() -> None:
    code = (
        "import sys\nfrom llmopt.optimizer.cli.main import main\n"
        "try: main(['--help'])\n"
        f"finally: print('loaded', [name for name in {HEAVY} if name in sys.modules])"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "loaded []" in result.stdout
    for name in cli.list_commands(click.Context(cli)):
        line = next(each for each in result.stdout.splitlines() if each.startswith(f"  {name} "))
        assert len(line.split()) > 2, f"{name} has no sentence"
    assert result.stdout.index("passes") < result.stdout.index("schema")


def test_help_of_each_command_imports_nothing_heavy() -> None:
    names = cli.list_commands(click.Context(cli))
    code = (
        "import sys\nfrom llmopt.optimizer.cli.main import main\n"
        f"for name in {names}:\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit as ended: assert not ended.code, name\n"
        "print('loaded', [name for name in ('torch', 'transformers', 'onnx', 'onnxruntime') if name in sys.modules])"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "loaded []" in result.stdout


def test_private_files_are_no_commands() -> None:
    names = cli.list_commands(click.Context(cli))
    assert {"init", "passes", "schema"} <= set(names)
    assert "main" not in names
    assert not any(name.startswith("_") for name in names)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"llmopt {version('llmopt')}\n"


def test_without_a_command_help_is_shown_and_that_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pases"], "no command named 'pases'; did you mean 'passes'?"),
        (["zzz"], "no command named 'zzz'; known: "),
        (["main"], "no command named 'main'"),
        (["../cli/passes"], "no command named '../cli/passes'"),
        (["--nope"], "--nope"),
        (["passes", "--nope"], "--nope"),
        (["passes", "a", "b"], "b"),
    ],
)
def test_wrong_usage_exits_with_2(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*args) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (InputError, 2),
        (PassError, 3),
        (RejectedError, 4),
        (UnsupportedError, 5),
        (VerificationError, 6),
        (ResourceError, 7),
    ],
)
def test_expected_errors_print_message_and_hint_and_exit_with_their_code(
    failing, kind: type[LlmoptError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(kind("it is broken", hint="repair it")) == code
    assert capsys.readouterr().err == "error: it is broken\nhint: repair it\n"


def test_a_recipe_error_prints_each_mistake_on_its_line(failing, capsys: pytest.CaptureFixture[str]) -> None:
    problems = [Problem("r.yaml", 3, "seed", "is wrong", "do better"), Problem("r.yaml", 5, "", "is wrong too")]
    assert failing(RecipeError(problems)) == 2
    assert capsys.readouterr().err.splitlines() == [
        "r.yaml:3: seed: is wrong  hint: do better",
        "r.yaml:5: is wrong too",
        "error: the recipe has 2 mistakes",
    ]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 7, "error: out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 7, "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 7, "error: out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 7, "error: the disk is full while writing /x/y"),
        (OSError(errno.EDQUOT, "Quota exceeded"), 7, "error: the disk quota is used up"),
        (OSError("32768 requested and 32080 written"), 7, "error: the disk is full"),
        (OSError(errno.EFBIG, "File too large", "/x"), 7, "error: the file system allows no file this large"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: cannot use /x: Permission denied"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x"), 2, "error: cannot use /x: Not a directory"),
        (ModuleNotFoundError("No module", name="starlette.routing"), 5, "hint: pip install 'llmopt[serve]'"),
        (ModuleNotFoundError("No module", name="onnxruntime"), 5, "hint: pip install 'llmopt[cpu]'"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
        (click.UsageError("bad"), 2, "Error: bad"),
        (click.exceptions.Exit(4), 4, ""),
    ],
)
def test_what_the_system_and_libraries_raise_becomes_a_code_and_a_sentence(
    failing, error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(error) == code
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert "bug" not in shown


@pytest.mark.parametrize("error", [KeyError("x"), FileNotFoundError(2, "No such file", "x"), ModuleNotFoundError("n")])
def test_anything_else_is_a_bug_and_says_how_to_see_where(
    failing, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(error) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {type(error).__name__}: ")
    assert "hint: this is a bug in llmopt; run again with --debug to see the traceback" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("args", [["--debug", "test"], ["test", "--debug"]])
@pytest.mark.parametrize("error", [KeyError("x"), InputError("no")])
def test_debug_shows_the_traceback_too(
    command, args: list[str], error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        raise error

    command(body)
    assert run(*args) == (2 if isinstance(error, InputError) else 1)
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_debug_can_be_asked_for_in_the_environment(
    failing, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMOPT_DEBUG", "1")
    failing(InputError("no"))
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (6, 6), ("text", 0)])
def test_a_returned_number_is_the_exit_code(command, returned: object, code: int) -> None:
    command(lambda: returned)
    assert run("test") == code


WORK = """
import pathlib, sys, tempfile, time
from llmopt.optimizer.cli._exit import exit_code_of, interrupted_by_signals

def body():
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as directory:
        try:
            print("working", flush=True)
            time.sleep(60)
        finally:
            print("cleaning", flush=True)
            time.sleep(0.3)
            pathlib.Path(directory, "file").touch()

with interrupted_by_signals():
    code = exit_code_of(body, wants_traceback=lambda: False)
sys.exit(code)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_unwinds_the_stack_and_exits_with_130(number: signal.Signals, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WORK, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "working\n"
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_does_not_break_into_the_cleaning_up(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WORK, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "working\n"
        process.terminate()
        assert process.stdout.readline() == "cleaning\n"
        process.terminate()
        process.wait(timeout=30)
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_was_ignored_stays_ignored(tmp_path: Path) -> None:
    code = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{WORK}"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert process.poll() is None
        process.terminate()
        process.wait(timeout=30)
    assert process.returncode == 130


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = (
        "from llmopt.optimizer.cli._exit import exit_code_of\nimport sys\n"
        "def body():\n"
        "    for _ in range(100000): print('x' * 100)\n"
        "sys.exit(exit_code_of(body, wants_traceback=lambda: False))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
    assert error == b""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_does_not_fit_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-c", "from llmopt.optimizer.cli.main import main; main(['passes'])"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 7
    assert result.stderr.startswith("error: the disk is full")
    assert "Exception ignored" not in result.stderr


def test_a_shell_gets_its_completions() -> None:
    code = "from llmopt.optimizer.cli.main import main; main([])"
    result = python(code, _LLMOPT_COMPLETE="bash_complete", COMP_WORDS="llmopt sch", COMP_CWORD="1")
    assert "plain,schema" in result.stdout
