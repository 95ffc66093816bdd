"""The generator of the reference pages, loaded from its file: docs/ is no package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "docs" / "generate.py"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", FILE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_only_the_marked_parts_change_and_a_second_run_changes_nothing(generate: ModuleType) -> None:
    text = "before\n<!-- begin: schemes -->\nold\n<!-- end -->\nafter\n"
    once = generate.rendered(text)
    assert once.startswith("before\n<!-- begin: schemes -->\n\n| scheme |")
    assert once.endswith("\n\n<!-- end -->\nafter\n")
    assert "old" not in once
    assert generate.rendered(once) == once


def test_an_unknown_part_is_an_error(generate: ModuleType) -> None:
    with pytest.raises(KeyError, match="sheemes"):
        generate.rendered("<!-- begin: sheemes -->\n<!-- end -->")


def test_a_pipe_does_not_break_a_table(generate: ModuleType) -> None:
    assert generate.table(("a",), [("x|y\nz",)]).splitlines()[-1] == r"| x\|y z |"


def test_every_page_is_found_by_the_index() -> None:
    index = (FILE.parent / "README.md").read_text("utf-8")
    pages = [path.name for path in FILE.parent.glob("*.md") if path.name != "README.md"]
    assert [name for name in pages if f"({name})" not in index] == []
