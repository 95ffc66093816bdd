"""Options of every command that executes an engine: which of a build's, and by what."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from llmopt.runtime.backends.opening import Executor

__all__ = ["executor_of", "executor_options"]

Command = TypeVar("Command", bound=Callable[..., Any])


def _options_of(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """``key=value`` each."""
    options = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"{value!r} is no option of a provider; write device_id=0", ctx, param)
        options[name] = text
    return options


_OPTIONS = (
    click.option(
        "--engine",
        type=click.Choice(["onnx", "tensorrt"]),
        help="Which of the build's engines to execute. [default: the fastest that runs here]",
    ),
    click.option(
        "--provider",
        type=click.Choice(["cpu", "cuda", "nv_tensorrt_rtx"]),
        help="What of ONNX Runtime executes it. [default: the CPU, or CUDA for an engine that was built for it]",
    ),
    click.option(
        "--provider-option",
        "provider_options",
        metavar="KEY=VALUE",
        multiple=True,
        callback=_options_of,
        help="Passed on to the provider; may be repeated.",
    ),
    click.option(
        "--cuda-graphs/--no-cuda-graphs",
        default=True,
        help="Whether TensorRT's decode calls are captured and replayed. [default: yes]",
    ),
)


def executor_options(command: Command) -> Command:
    """Add the options, in the order in which ``--help`` shows them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def executor_of(options: dict[str, Any]) -> "Executor":
    """What they mean.

    Raises:
        InputError: They contradict each other.
    """
    from llmopt.runtime.backends.opening import Executor

    return Executor(
        engine=options["engine"],
        provider=options["provider"],
        provider_options=options["provider_options"],
        cuda_graphs=options["cuda_graphs"],
    )
