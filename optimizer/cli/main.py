"""The ``llmopt`` command, whose subcommands are the files beside this one.

Command NAME is the file ``optimizer/cli/NAME.py`` and its ``command``, imported when it is called; files that start
with an underscore are no commands. ``--help`` reads the files' docstrings instead, so that it answers at once.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from llmopt.optimizer.cli._exit import exit_code_of, interrupted_by_signals

__all__ = ["cli", "main"]

_FOLDER = Path(__file__).parent


@dataclass(slots=True)
class _Session:
    """What the group learns before a command runs: the ``obj`` of every click context."""

    debug: bool


class _LazyGroup(click.Group):
    """Finds subcommands by file name."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return sorted(path.stem for path in _FOLDER.glob("[!_]*.py") if path.stem != "main")

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"llmopt.optimizer.cli.{cmd_name}").command
        if all(parameter.name != "debug" for parameter in command.params):
            command.params.append(_debug_option(hidden=True))
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            from llmopt.optimizer.loader import nearest

            raise click.UsageError(f"no command named {args[0]!r}; {nearest(args[0], known)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from llmopt.optimizer.loader import first_line

        with formatter.section("Commands"):
            formatter.write_dl([(name, first_line(_FOLDER / f"{name}.py")) for name in self.list_commands(ctx)])


def _debug_option(*, hidden: bool = False) -> click.Option:
    """``--debug``, which the group has and every command takes too, since that is where people append it."""
    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        hidden=hidden,
        callback=_remember_debug,
        help="Show the traceback of an error; so does LLMOPT_DEBUG=1.",
    )


def _remember_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:  # noqa: ARG001 - click's signature
    if value and (session := ctx.find_object(_Session)):
        session.debug = True


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:  # noqa: ARG001 - click's signature
    if value:
        from importlib.metadata import version

        click.echo(f"llmopt {version('llmopt')}")
        ctx.exit()


_version_option = click.Option(
    ["--version"],
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Print the version and exit.",
)

cli = _LazyGroup(
    "llmopt",
    help="A compiler for language models: checkpoint in, measured and servable engine out.",
    epilog="llmopt COMMAND --help describes a command.",
    params=[_version_option, _debug_option()],
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)


def main(args: Sequence[str] | None = None) -> None:
    """Run ``llmopt`` and end the process with the exit code of docs/architecture.md.

    Args:
        args: The command line without the program's name; the process's own when omitted.

    Raises:
        SystemExit: Always.
    """
    # torch's threads would otherwise spin while they wait, which on busy cores makes them several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "_LLMOPT_COMPLETE" in os.environ:  # set by the shell when it asks for completions, which click answers
        cli.main(prog_name="llmopt")
    arguments = list(sys.argv[1:] if args is None else args)
    session = _Session(debug=bool(os.environ.get("LLMOPT_DEBUG")))

    def run() -> object:
        with cli.make_context("llmopt", arguments, obj=session) as context:
            return cli.invoke(context)

    with interrupted_by_signals():
        code = exit_code_of(run, wants_traceback=lambda: session.debug)
    sys.exit(code)
