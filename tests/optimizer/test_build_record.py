"""The record of a build: each step's own peak, told in the order of the steps."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from llmopt.optimizer.build_record import BuildRecord, peak_memory, read_record


def in_a_process_of_its_own(body: str, directory: Path) -> None:
    """Other tests leave memory to this process that moves the figures."""
    code = f"import runpy, pathlib; runpy.run_path({__file__!r})[{body!r}](pathlib.Path({str(directory)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_steps_peak_is_its_own(tmp_path: Path) -> None:
    in_a_process_of_its_own("_steps", tmp_path)


def test_what_runs_between_two_steps_counts_for_the_whole_build(tmp_path: Path) -> None:
    in_a_process_of_its_own("_between", tmp_path)


def _steps(tmp_path: Path) -> None:
    size = 200 << 20
    record = BuildRecord()
    for name, count in (("small", 0), ("large", size), ("after", 0)):
        with record.step(name):
            np.ones(count, np.int8)
    record.save(tmp_path)
    found = read_record(tmp_path)
    assert found is not None
    peaks = found["peak_memory_bytes_by_step"]
    assert list(peaks) == ["small", "large", "after"]
    # The array is freed before the next step begins; other memory of this process moves by far less than half of it.
    assert peaks["large"] - peaks["small"] > size / 2
    assert peaks["large"] - peaks["after"] > size / 2
    assert found["peak_memory_bytes"] == peaks["large"]


def _between(tmp_path: Path) -> None:
    size = 200 << 20
    record = BuildRecord()
    with record.step("one"):
        pass
    np.ones(size, np.int8)
    with record.step("two"):
        pass
    record.save(tmp_path)
    found = read_record(tmp_path)
    assert found is not None
    assert found["peak_memory_bytes"] - max(found["peak_memory_bytes_by_step"].values()) > size / 2
    assert peak_memory() < found["peak_memory_bytes"]


def test_a_build_without_a_record_has_none(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    (tmp_path / "build-record.json").write_text("{")
    assert read_record(tmp_path) is None
