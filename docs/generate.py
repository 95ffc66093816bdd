"""Writes the generated parts of the documentation: ``make docs``; ``make check`` fails when one is stale.

A generated part stands between ``<!-- begin: NAME -->`` and ``<!-- end -->`` in docs/*.md, README.md or
CONTRIBUTING.md, where NAME is a key of ``BLOCKS``. Everything else in those files is written by hand.
"""

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from llmopt.optimizer import loader
from llmopt.optimizer.arch import known, known_encoders
from llmopt.optimizer.arch.base import Arch
from llmopt.optimizer.cli.main import cli
from llmopt.optimizer.encoder import EncoderArch
from llmopt.optimizer.gates import Gate
from llmopt.optimizer.options import options_of, words_of
from llmopt.optimizer.recipe import Settings
from llmopt.optimizer.scheme import PRESETS, QuantSpec, Scheme
from llmopt.optimizer.target import TARGETS

ROOT = Path(__file__).parents[1]
WIDTH = 100
_SEPARATE = {Scheme.__name__, QuantSpec.__name__, Gate.__name__}
"""Mappings with a section of their own."""

Schema = Mapping[str, Any]


def command_table() -> str:
    """One line per command."""
    context = click.Context(cli, info_name="llmopt")
    names = cli.list_commands(context)
    return table(("command", "what it does"), [(f"`llmopt {name}`", summary(command_of(name))) for name in names])


def command_help() -> str:
    """The help text of every command, and of what is below it."""
    parent = click.Context(cli, info_name="llmopt")
    return "\n\n".join(
        section for name in cli.list_commands(parent) for section in _help_of(command_of(name), name, parent)
    )


def _help_of(command: click.Command, name: str, parent: click.Context) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=parent, terminal_width=WIDTH)
    yield f"## {context.command_path}\n\n```text\n{context.get_help().rstrip()}\n```"
    if isinstance(command, click.Group):
        for below, each in command.commands.items():
            yield from _help_of(each, below, context)


def recipe_keys() -> str:
    """The top level of a recipe."""
    schema = Settings.model_json_schema()
    steps = {
        "passes": _list_of("pass", "Weight passes, in the order in which they run."),
        "export": _list_of("exporter", "What to write."),
    }
    whole = {**schema, "properties": {**schema["properties"], **steps}, "required": [*schema["required"], *steps]}
    return "\n\n".join([option_table(whole), *_nested_tables(schema)])


def pass_options() -> str:
    """Every weight pass with its options."""
    return _option_sections("passes")


def graph_passes() -> str:
    """One line per graph pass."""
    rows = [(f"`{name}`", text) for name, text in loader.names("passes.graph").items()]
    return table(("graph pass", "what it does"), rows)


def families() -> str:
    """One line per family of decoders: its file, the architectures it covers, and the first line of the file."""
    return _family_table(known())


def encoder_families() -> str:
    """The same of encoders."""
    return _family_table(known_encoders())


def _family_table(families: Sequence[Arch | EncoderArch]) -> str:
    rows = []
    for arch in families:
        text = inspect.getdoc(importlib.import_module(f"llmopt.optimizer.arch.{arch.name}")) or ""
        rows.append((f"`{arch.name}`", ", ".join(f"`{name}`" for name in arch.models), text.splitlines()[0]))
    return table(("file", "architectures", "what it is"), rows)


def exporter_options() -> str:
    """Every exporter with its options."""
    return _option_sections("exporters")


def gate_options() -> str:
    """The keys of an ``accept`` entry."""
    return option_table(Gate.model_json_schema())


def scheme_table() -> str:
    """The presets, and which targets run them."""
    rows = []
    for name, scheme in PRESETS.items():
        inputs = "float" if scheme.input_activations is None else _spec_words(scheme.input_activations)
        targets = ", ".join(target.name for target in TARGETS.values() if target.refusal(scheme) is None)
        rows.append((f"`{name}`", _spec_words(scheme.weights), inputs, targets or "none yet"))
    return table(("scheme", "weights", "inputs", "targets"), rows)


def scheme_options() -> str:
    """The long form of a scheme."""
    return option_table(QuantSpec.model_json_schema())


BLOCKS: dict[str, Callable[[], str]] = {
    "commands": command_table,
    "command help": command_help,
    "recipe": recipe_keys,
    "passes": pass_options,
    "families": families,
    "encoder families": encoder_families,
    "graph passes": graph_passes,
    "exporters": exporter_options,
    "gates": gate_options,
    "schemes": scheme_table,
    "scheme options": scheme_options,
}


def command_of(name: str) -> click.Command:
    """The command called ``name``, imported."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


def summary(command: click.Command) -> str:
    """The first line of a command's help."""
    return (command.help or "").partition("\n")[0]


def option_table(schema: Schema) -> str:
    """The properties of a pydantic model's JSON schema as a table."""
    rows = [
        (f"`{option.name}`", option.takes, _quoted(option.default), option.meaning) for option in options_of(schema)
    ]
    return table(("key", "type", "default", "meaning"), rows) if rows else "It has no options."


def _quoted(default: str) -> str:
    return default if default in ("required", "not set", "empty") else f"`{default}`"


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A markdown table."""
    escaped = [tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    lines = [header, tuple("---" for _ in header), *escaped]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rendered(text: str) -> str:
    """``text`` with every generated part made anew.

    Raises:
        KeyError: A part has a name that is not in ``BLOCKS``.
    """
    return re.sub(
        r"(<!-- begin: (.+?) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{BLOCKS[found[2]]()}\n\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


def _list_of(noun: str, description: str) -> Schema:
    return {"type": "array", "items": {"$ref": noun}, "description": f"{description} Each is `name: {{options}}`."}


def _option_sections(kind: loader.Kind) -> str:
    sections = []
    for name, text in loader.names(kind).items():
        schema = loader.load(kind, name).model_json_schema()
        parts = [f"### {name}", text, option_table(schema), *_nested_tables(schema)]
        sections.append("\n\n".join(parts))
    return "\n\n".join(sections)


def _nested_tables(schema: Schema) -> list[str]:
    """A table for each mapping that an option may hold and that has no section of its own."""
    return [
        f"Keys of `{words_of(name)}`:\n\n{option_table({**each, '$defs': schema['$defs']})}"
        for name, each in schema.get("$defs", {}).items()
        if "properties" in each and name not in _SEPARATE
    ]


def _spec_words(spec: QuantSpec) -> str:
    shared = {"token": "per token", "channel": "per output channel", "tensor": "per tensor"}
    if spec.block_structure is not None:
        scale = f"per block of {spec.block_structure[0]} rows and {spec.block_structure[1]} input columns"
    else:
        scale = shared.get(spec.strategy, f"per {spec.group_size} input columns")
    kind = "fp8 e4m3" if spec.type == "float" else f"int{spec.num_bits}"
    form = "symmetric" if spec.symmetric else "asymmetric"
    return f"{kind}, {form}, {'dynamic ' if spec.dynamic else ''}scale {scale}"


def main() -> int:
    """Rewrite the files, or with ``--check`` only name the stale ones."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; end with 1 when a file is stale")
    check = parser.parse_args().check
    stale = []
    for path in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        text = path.read_text("utf-8")
        if (new := rendered(text)) != text:
            stale.append(path)
            if not check:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        sys.stderr.write(f"{path.relative_to(ROOT)} {'is stale: run `make docs`' if check else 'was written'}\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
