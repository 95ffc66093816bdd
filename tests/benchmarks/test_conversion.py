"""What the benchmark of conversions reads of the command's own words."""

import pytest

from llmopt.benchmarks.conversion import seconds_of


def test_the_step_that_writes_is_timed() -> None:
    log = "load_model: 5.2 s\nwrite compressed-tensors: 4.6 s\n"
    assert seconds_of(log) == 4.6


def test_a_log_without_it_is_an_error() -> None:
    with pytest.raises(ValueError, match="no step that writes"):
        seconds_of("load_model: failed after 2.4 s\n")
