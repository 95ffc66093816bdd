"""Finding passes and exporters by file name, and those of other distributions by entry point."""

import subprocess
import sys
from pathlib import Path

import pytest

from llmopt.optimizer import loader
from llmopt.optimizer.contracts import Exporter, GraphPass, WeightPass
from llmopt.optimizer.errors import InputError

KINDS = {"passes": WeightPass, "passes.graph": GraphPass, "exporters": Exporter}

PASS = '''"""Leave the model alone, politely.

More about it.
"""

from llmopt.optimizer.contracts import WeightPass

__all__ = ["Nothing"]


class Nothing(WeightPass):
    """Does nothing."""

    loud: bool = False

    def run(self, model, context):
        return model


class Unfinished(WeightPass):
    """Has no run."""
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a distribution with one module and one entry point on the path; its module's name is unique to the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    added: list[str] = []

    def install_(name: str, value: str = "", *, source: str = PASS, distribution: str = "polite-passes") -> str:
        module = f"polite_{tmp_path.name.replace('-', '_')}_{len(added)}"
        added.append(module)
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        info = tmp_path / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        line = f"{name} = {value.format(module=module) or module}\n"
        with (info / "entry_points.txt").open("a") as file:
            file.write(f"[llmopt.passes]\n{line}")
        return module

    yield install_
    for module in added:
        sys.modules.pop(module, None)


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_has_a_sentence_and_loads_as_the_class_of_its_kind(kind: loader.Kind) -> None:
    found = loader.names(kind)
    assert found
    assert list(found) == sorted(found)
    for name, summary in found.items():
        assert summary, name
        assert issubclass(loader.load(kind, name), KINDS[kind])


def test_private_files_and_other_folders_are_no_names() -> None:
    assert not any(name.startswith("_") for kind in KINDS for name in loader.names(kind))
    assert "graph" not in loader.names("passes")


def test_an_exporter_may_be_a_folder() -> None:
    assert loader.load("exporters", "onnx").__module__ == "llmopt.exporters.onnx.exporter"


def test_listing_names_imports_no_pass() -> None:
    code = (
        "import sys\nfrom llmopt.optimizer import loader\n"
        "names = [loader.names(kind) for kind in ('passes', 'passes.graph', 'exporters')]\n"
        "assert all(names), names\n"
        "print([name for name in sys.modules if name.startswith('llmopt.passes.') or name in ('torch', 'onnx')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("kind", "name", "message", "hint"),
    [
        ("passes", "round_to_neerest", "no pass named 'round_to_neerest'", "did you mean 'round_to_nearest'?"),
        ("passes", "Round-To-Nearest", "no pass named 'Round-To-Nearest'", "did you mean 'round_to_nearest'?"),
        ("passes.graph", "fuse_qkw", "no graph pass named 'fuse_qkw'", "did you mean 'fuse_qkv'?"),
        ("exporters", "zzz", "no exporter named 'zzz'", "known: checkpoint, gguf, onnx"),
        ("passes", "../optimizer/loader", "no pass named '../optimizer/loader'", "known: "),
        ("passes", "_zzz", "no pass named '_zzz'", "known: "),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(kind: loader.Kind, name: str, message: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        loader.load(kind, name)
    assert caught.value.message == message
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize("value", ["", "{module}:Nothing"])
def test_a_pass_of_another_distribution_is_found_and_described_without_importing_it(install, value: str) -> None:
    module = install("polite", value)
    assert loader.names("passes")["polite"] == "Leave the model alone, politely."
    assert module not in sys.modules
    assert loader.load("passes", "polite").__name__ == "Nothing"


def test_a_misspelt_name_finds_a_pass_of_another_distribution(install) -> None:
    install("polite")
    with pytest.raises(InputError) as caught:
        loader.load("passes", "polit")
    assert caught.value.hint == "did you mean 'polite'?"


def test_a_pass_of_another_distribution_may_not_take_the_name_of_ours(install) -> None:
    install("round_to_nearest")
    with pytest.raises(InputError, match=r"'round_to_nearest' is taken twice: by llmopt itself and by polite-passes"):
        loader.names("passes")


def test_two_distributions_may_not_provide_the_same_name(install) -> None:
    install("polite")
    install("polite", distribution="rude-passes")
    with pytest.raises(InputError, match=r"'polite' is taken twice: by \S+-passes and by \S+-passes"):
        loader.load("passes", "round_to_nearest")


@pytest.mark.parametrize(
    ("source", "value", "message"),
    [
        ("import nothing_of_this_name", "", "cannot be imported: ModuleNotFoundError: No module named"),
        ("1 / 0", "", "cannot be imported: ZeroDivisionError: division by zero"),
        (PASS, "{module}:Missing", "cannot be imported: AttributeError"),
        ("x = 1", "", "must have exactly one name in __all__, not 0"),
        ("class Nothing: pass", "{module}:Nothing", "which is no WeightPass"),
        ("Nothing = 3", "{module}:Nothing", "which is no WeightPass"),
        (PASS, "{module}:Unfinished", "which lacks run"),
    ],
)
def test_a_broken_pass_of_another_distribution_is_a_clear_error(install, source: str, value: str, message: str) -> None:
    install("polite", value, source=source)
    with pytest.raises(InputError) as caught:
        loader.load("passes", "polite")
    assert message in caught.value.message
    assert "polite" in caught.value.message
    assert caught.value.hint


def test_a_broken_pass_of_another_distribution_does_not_keep_others_from_loading(install) -> None:
    install("polite", source="1 / 0")
    assert "polite" in loader.names("passes")
    assert loader.load("passes", "round_to_nearest")


def test_a_file_of_ours_with_two_public_names_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt.passes import round_to_nearest

    monkeypatch.setattr(round_to_nearest, "__all__", ["RoundToNearest", "other"])
    with pytest.raises(TypeError, match="exactly one name in __all__, not 2"):
        loader.load("passes", "round_to_nearest")
