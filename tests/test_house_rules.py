"""The rules of ARCHITECTURE and STYLE that a program can check: import directions, packaging, names, documentation."""

import ast
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "optimizer": set(),
    "calibration": set(),
    "passes": {"calibration"},
    "exporters": set(),
    "runtime": set(),
    "evaluation": {"calibration", "runtime"},
    "benchmarks": {"calibration", "evaluation", "runtime"},
}
"""What each folder may import besides itself and ``optimizer``."""

PACKAGES = sorted(MAY_IMPORT)
COMMANDS = sorted(
    path.stem
    for path in (ROOT / "optimizer/cli").glob("*.py")
    if path.stem not in {"__init__", "main"} and path.stem[0] != "_"
)


class Import(NamedTuple):
    """One imported module and whether the import runs only when a function is called."""

    module: str
    line: int
    when_called: bool


def imports_of(tree: ast.AST, *, when_called: bool = False) -> Iterator[Import]:
    """Every import below ``tree``; those that only a type checker sees count as ``when_called``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, when_called) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "llmopt" else [module]
            yield from (Import(name, node.lineno, when_called) for name in names)
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            yield from imports_of(node, when_called=when_called or is_function or is_typing)


@cache
def sources(package: str) -> dict[str, ast.Module]:
    """The parsed files of one top folder, by path relative to the repository."""
    files = sorted((ROOT / package).rglob("*.py"))
    return {str(file.relative_to(ROOT)): ast.parse(file.read_text("utf-8")) for file in files}


@cache
def pyproject() -> dict[str, dict]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def declared_requirements() -> set[str]:
    """Normalized names of all dependencies in pyproject.toml, extras included."""
    project = pyproject()["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {normalized(re.split(r"[^\w.-]", line)[0]) for line in lines}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def tracked_files() -> list[Path]:
    """What git tracks, or every file where this is not a git checkout."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        return [path for name in [*PACKAGES, "docs", "recipes", "tests"] for path in (ROOT / name).rglob("*.*")]
    return [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


def python(code: str) -> str:
    """Standard output of ``code`` in a new interpreter."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    wrong = []
    for file, tree in sources(package).items():
        reaches_all = file == "optimizer/build.py" or file.startswith("optimizer/cli/")
        for found in imports_of(tree):
            parts = found.module.split(".")
            if parts[0] != "llmopt" or len(parts) < 2 or parts[1] in {package, "optimizer"} | MAY_IMPORT[package]:
                continue
            if not (reaches_all and found.when_called):
                wrong.append(f"{file}:{found.line} imports {found.module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_library_imported_is_a_declared_dependency(package: str) -> None:
    installed = importlib.metadata.packages_distributions()
    known = sys.stdlib_module_names | {"llmopt", "pydantic_core"}  # pydantic pins pydantic_core to one version
    undeclared = {}
    for file, tree in sources(package).items():
        if file.startswith(("benchmarks/load/run_", "benchmarks/loaders/run_", "benchmarks/quantizers/run_")):
            continue  # scripts for the environments of other programs
        for found in imports_of(tree):
            top = found.module.split(".")[0]
            providers = {normalized(name) for name in installed.get(top, [top])}
            if top not in known and not providers & declared_requirements():
                undeclared[f"{file}:{found.line}"] = found.module
    assert not undeclared


def test_every_package_is_listed_in_pyproject() -> None:
    folders = {path.parent.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")}
    setuptools = pyproject()["tool"]["setuptools"]
    expected = {"llmopt." + ".".join(folder.parts): folder.as_posix() for folder in folders}
    assert set(setuptools["packages"]) == set(expected)
    assert setuptools["package-dir"] == expected


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", pin) for pin in pins)
    other_hardware = {"onnxruntime-gpu", "tensorrt"}
    assert declared_requirements() - {pin.split("==")[0] for pin in pins} <= other_hardware


def test_the_runtime_needs_neither_torch_nor_transformers() -> None:
    modules = [file.removesuffix(".py").replace("/", ".") for file in sources("runtime")]
    names = [module.removesuffix(".__init__") for module in modules]
    lines = [f"import llmopt.{name}" for name in names]
    loaded = python("\n".join(["import sys", *lines, "print(sorted({'torch', 'transformers'} & set(sys.modules)))"]))
    assert loaded.strip() == "[]"


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['llmopt', '--help']\n"
        "from llmopt.optimizer.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('loaded:', sorted({'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    assert python(code).strip().endswith("loaded: []")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_in_one_line_what_it_does(name: str) -> None:
    command = importlib.import_module(f"llmopt.optimizer.cli.{name}").command
    first, _, rest = (command.help or "").partition("\n")
    assert 10 < len(first) <= 100
    assert first.endswith(".")
    assert not rest or rest.startswith("\n"), "the first paragraph is one line"


@pytest.mark.parametrize("folder", ["passes", "passes/graph"])
def test_every_pass_has_a_test_file_of_its_name(folder: str) -> None:
    names = [path.stem for path in (ROOT / folder).glob("*.py") if not path.stem.startswith("_")]
    assert [name for name in sorted(names) if not (ROOT / "tests" / folder / f"test_{name}.py").is_file()] == []


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads(recipe: Path) -> None:
    from llmopt.optimizer.recipe import Recipe

    assert Recipe.load(recipe).export


def test_no_file_is_a_drawer_for_odds_and_ends() -> None:
    drawers = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert [str(path) for path in tracked_files() if path.name in drawers] == []


def test_tests_are_no_packages() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_no_file_names_this_machine_or_a_package_registry() -> None:
    machine_path = re.compile(r"(?<![\w.~*-])/(?:work|root|home|opt|Users)/\w|/tmp/w/")
    registry = re.compile(r"pythonhosted\.|\bpypi\.(?:org|python)|download\.pytorch|index-url[ =]+(?:https?|file):")
    wrong = []
    for path in tracked_files():
        if path == Path(__file__) or path.suffix in {".png", ".safetensors", ".gguf", ".onnx", ".pyc"}:
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            if machine_path.search(line) or registry.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif("LLMOPT_TEST_INSTALLED" not in os.environ, reason="set by `make test`, which installs the wheel")
def test_the_installed_wheel_is_tested_and_not_the_tree() -> None:
    for package in PACKAGES:
        file = importlib.import_module(f"llmopt.{package}").__file__
        assert file
        assert "site-packages" in Path(file).parts
        assert Path(sys.prefix) in Path(file).parents
    version = subprocess.run(
        [Path(sys.executable).with_name("llmopt"), "--version"], capture_output=True, text=True, check=True
    )
    assert importlib.metadata.version("llmopt") in version.stdout
