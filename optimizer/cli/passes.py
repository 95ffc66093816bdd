"""List the weight and graph passes, or the options of one."""

from typing import Any

import click

__all__ = ["command"]


@click.command()
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """List the weight and graph passes, or the options of one.

    A recipe names weight passes; graph passes run as the target of an export needs them.
    """
    from llmopt.optimizer import loader
    from llmopt.optimizer.errors import InputError

    weight, graph = loader.names("passes"), loader.names("passes.graph")
    if name is None:
        _list("Weight passes", weight)
        click.echo()
        _list("Graph passes", graph)
    elif name in weight:
        _describe(name, weight[name], loader.load("passes", name).model_json_schema())
    elif name in graph:
        _describe(name, graph[name], loader.load("passes.graph", name).model_json_schema())
    else:
        raise InputError(f"no pass named {name!r}", hint=loader.nearest(name, [*weight, *graph]))


def _list(title: str, found: dict[str, str]) -> None:
    click.secho(title, bold=True)
    width = max((len(name) for name in found), default=0)
    for name, summary in found.items():
        click.echo(f"  {name:{width}}  {summary}")
    if not found:
        click.echo("  none")


def _describe(name: str, summary: str, schema: dict[str, Any]) -> None:
    from llmopt.optimizer.options import nested_options, options_of

    click.secho(name, bold=True)
    click.echo(summary)
    _table("", options_of(schema))
    for title, options in nested_options(schema):
        _table(f"{title.capitalize()} options", options)


def _table(title: str, options: list[Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    click.echo()
    if title:
        click.secho(title, bold=True)
    if not options:
        click.echo("It has no options.")
        return
    table = Table("option", "takes", "default", "meaning", box=box.SIMPLE_HEAD, pad_edge=False)
    for each in options:
        table.add_row(each.name, each.takes, each.default, each.meaning)
    Console(markup=False, highlight=False).print(table)
