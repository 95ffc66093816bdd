"""Print the JSON schema of recipes, for editors."""

import click

__all__ = ["command"]


@click.command()
def command() -> None:
    """Print the JSON schema of recipes, for editors.

    \b
    llmopt schema > recipe.schema.json
    and then, in the first line of a recipe, for editors with yaml-language-server:
    # yaml-language-server: $schema=recipe.schema.json
    """  # noqa: D301 - click's mark
    import json

    from llmopt.optimizer.recipe_schema import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
