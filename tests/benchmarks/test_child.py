import sys
from pathlib import Path

import pytest

from llmopt.benchmarks.child import ChildError, run


def test_output_is_returned_and_messages_go_to_the_log(tmp_path: Path) -> None:
    code = "import sys; print('figures'); print('progress', file=sys.stderr)"
    finished = run([sys.executable, "-c", code], log=tmp_path / "logs" / "one.log")
    assert finished.output == "figures\n"
    assert finished.seconds > 0
    assert (tmp_path / "logs" / "one.log").read_text() == "progress\n"


def test_peak_memory_is_the_childs_own(tmp_path: Path) -> None:
    small = run([sys.executable, "-c", "import time; time.sleep(0.2)"], log=tmp_path / "small.log")
    large = run(
        [sys.executable, "-c", "import time; kept = bytearray(b'x' * 100_000_000); time.sleep(0.2)"],
        log=tmp_path / "large.log",
    )
    assert large.peak_bytes - small.peak_bytes > 90_000_000


def test_variables_are_added_to_the_environment(tmp_path: Path) -> None:
    code = "import os; print(os.environ['LLMOPT_TEST_VARIABLE'], 'PATH' in os.environ)"
    finished = run([sys.executable, "-c", code], log=tmp_path / "log", environment={"LLMOPT_TEST_VARIABLE": "set"})
    assert finished.output == "set True\n"


def test_a_failure_says_what_the_program_said(tmp_path: Path) -> None:
    with pytest.raises(ChildError, match="ended with 3:\nthe reason") as caught:
        run(
            [sys.executable, "-c", "import sys; print('the reason', file=sys.stderr); sys.exit(3)"],
            log=tmp_path / "log",
        )
    assert str(tmp_path / "log") in str(caught.value.hint)
