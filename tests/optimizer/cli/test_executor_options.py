"""What a command line asks for reaches whoever opens the engine."""

import click
import pytest
from click.testing import CliRunner

from llmopt.optimizer.cli import bench, chat, eval, generate, serve  # noqa: A004
from llmopt.optimizer.cli._executor_options import executor_of, executor_options
from llmopt.runtime.backends.opening import Executor


def meant(*arguments):
    """The executor that these arguments mean, or the outcome where they mean none."""
    found = []

    @click.command()
    @executor_options
    def command(**options):
        found.append(executor_of(options))

    outcome = CliRunner().invoke(command, arguments)
    return found[0] if found else outcome


def test_nothing_asked_for_is_the_default():
    assert meant() == Executor()


def test_options_of_a_provider_are_passed_on_as_they_are():
    found = meant("--provider", "cuda", "--provider-option", "device_id=1", "--provider-option", "a=b=c")
    assert found == Executor(provider="cuda", provider_options={"device_id": "1", "a": "b=c"})


def test_tensorrt_without_graphs():
    assert meant("--engine", "tensorrt", "--no-cuda-graphs") == Executor(engine="tensorrt", cuda_graphs=False)


@pytest.mark.parametrize("value", ["device_id", "=1"])
def test_an_option_without_a_name_or_a_value_is_a_usage_error(value):
    outcome = meant("--provider", "cuda", "--provider-option", value)
    assert outcome.exit_code == 2
    assert "write device_id=0" in outcome.stderr


@pytest.mark.parametrize("module", [bench, chat, eval, generate, serve])
def test_every_command_that_executes_an_engine_has_them(module):
    names = {option.name for option in module.command.params}
    assert {"engine", "provider", "provider_options", "cuda_graphs"} <= names
