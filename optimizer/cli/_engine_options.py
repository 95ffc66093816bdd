"""Options of every command that runs an engine: how much memory it may take, and what it may trade for what."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llmopt.optimizer.cli._executor_options import executor_of, executor_options

if TYPE_CHECKING:
    from llmopt.runtime.policy import Choices

__all__ = ["choices_of", "engine_options", "opening_of"]

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--slots", type=click.IntRange(1), help="Requests that run at once. [default: 16, or as many as fit]"),
    click.option(
        "--prefix-slots",
        type=click.IntRange(0),
        help="More slots, to keep what prompts may begin with. [default: as many again, or as fit]",
    ),
    click.option(
        "--memory",
        type=click.FloatRange(0, min_open=True),
        help="GB that keys and values may take. [default: half of what is free]",
    ),
    click.option(
        "--context",
        type=click.IntRange(2),
        help="Tokens per request, prompt and answer. [default: the engine's, <= 2048]",
    ),
    click.option("--threads", type=click.IntRange(1), help="Threads of the engine. [default: all cores]"),
    click.option(
        "--exact/--no-exact",
        default=None,
        help="Whether answers must be the same bits whatever else runs. [default: if the engine can promise it]",
    ),
    click.option("--prefix-cache/--no-prefix-cache", default=True, help="Whether prompts share what they begin with."),
    click.option(
        "--latency-target",
        default=100,
        show_default=True,
        type=click.IntRange(0),
        help="Milliseconds between two tokens of an answer that reading prompts should not exceed; 0 is no limit.",
    ),
    click.option("--speculate", is_flag=True, help="Guess tokens from the text itself; needs --no-exact."),
    click.option(
        "--draft",
        type=click.Path(path_type=Path),
        help="A build of a smaller model that guesses tokens; needs --no-exact.",
    ),
    click.option("--draft-tokens", default=5, show_default=True, type=click.IntRange(1, 16), help="Guessed at once."),
)


def engine_options(command: Command) -> Command:
    """Add the options, in the order in which ``--help`` shows them."""
    command = executor_options(command)
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def opening_of(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``open_build`` that they mean."""
    memory = options["memory"]
    return {
        "slots": options["slots"],
        "kept_slots": options["prefix_slots"],
        "memory": None if memory is None else int(memory * 1e9),
        "context": options["context"],
        "threads": options["threads"],
        "executor": executor_of(options),
    }


def choices_of(options: dict[str, Any]) -> "Choices":
    """What they choose.

    Raises:
        InputError: They contradict each other.
    """
    from llmopt.optimizer.errors import InputError
    from llmopt.runtime.policy import Choices

    if (options["speculate"] or options["draft"] is not None) and options["exact"] is not False:
        raise InputError(
            "guessed tokens make answers depend on the load in their last digits", hint="allow that with --no-exact"
        )
    return Choices(
        exact=options["exact"],
        prefix_cache=options["prefix_cache"],
        latency_target=options["latency_target"] / 1000,
        speculate=options["speculate"],
        draft=options["draft"],
        draft_tokens=options["draft_tokens"],
        threads=options["threads"],
    )
