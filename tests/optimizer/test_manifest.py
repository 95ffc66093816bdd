"""The manifest: written and read back, and a build that is not what it says is refused."""

import json
from pathlib import Path

import pytest

from llmopt.optimizer.errors import InputError, VerificationError
from llmopt.optimizer.manifest import (
    FileEntry,
    GateResult,
    Manifest,
    Measurement,
    PassRecord,
    SourceEntry,
    Verdict,
    sha256_of,
)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Of a build with two files, in ``tmp_path``."""
    (tmp_path / "engine").mkdir()
    files = {}
    for name in ("engine/model.onnx", "tokenizer.json"):
        (tmp_path / name).write_bytes(name.encode() * 100)
        files[name] = FileEntry(bytes=len(name) * 100, sha256=sha256_of(tmp_path / name))
    made = Manifest(
        llmopt="0.1",
        versions={"torch": "2"},
        source=SourceEntry(spec="./modèle", digest="d" * 64, files={"config.json": "c" * 64}),
        recipe={"version": 1, "seed": 0},
        architecture="llama",
        layers=[],
        passes=[PassRecord(name="p", changed=True, details={"errors": {"lm_head": 0.1}})],
        engines=[],
        measurements=[Measurement(metric="kl", value=0.1 + 0.2, data="sampled", data_digest="e", tokens=3)],
        verdict=Verdict(status="rejected", gates=[GateResult(gate={"metric": "kl"}, value=1e-300, passed=False)]),
        files=files,
    )
    made.save(tmp_path)
    return made


@pytest.fixture
def edit(manifest: Manifest, tmp_path: Path):
    """Changes the written manifest's data."""

    def edit_(change) -> None:
        data = json.loads((tmp_path / "manifest.json").read_text())
        change(data)
        (tmp_path / "manifest.json").write_text(json.dumps(data))

    return edit_


@pytest.mark.parametrize("verify", [False, True])
def test_what_was_saved_is_loaded(manifest: Manifest, tmp_path: Path, verify: bool) -> None:
    assert Manifest.load(tmp_path, verify=verify) == manifest


def test_equal_manifests_are_equal_files(manifest: Manifest, tmp_path: Path) -> None:
    before = (tmp_path / "manifest.json").read_bytes()
    turned = manifest.model_copy(update={"files": dict(reversed(manifest.files.items()))})
    turned.save(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert before.endswith(b"}\n")


def test_a_measurement_that_is_no_number_survives(manifest: Manifest, tmp_path: Path) -> None:
    broken = manifest.measurements[0].model_copy(update={"value": float("nan")})
    manifest.model_copy(update={"measurements": [broken]}).save(tmp_path)
    (found,) = Manifest.load(tmp_path).measurements
    assert found.value != found.value


@pytest.mark.parametrize("name", ["there", "nowhere"])
def test_a_directory_without_a_manifest_is_no_build(tmp_path: Path, name: str) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match=rf"{name} is not a build: it has no manifest\.json") as caught:
        Manifest.load(tmp_path / name)
    assert caught.value.hint == "make one: llmopt build"


@pytest.mark.parametrize("content", [b"", b"{", b'{"schema_number": 1', b"\xff\xfe", b"\x00" * 100])
def test_a_manifest_that_is_no_json_is_damaged(manifest: Manifest, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(VerificationError, match=r"manifest\.json is damaged") as caught:
        Manifest.load(tmp_path)
    assert caught.value.hint == "build it again"


@pytest.mark.parametrize("content", ["[]", "null", '"text"', "{}", '{"name": "a web app"}'])
def test_json_that_is_no_manifest_has_another_schema(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match="has schema None, this llmopt reads 1"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("number", [0, 2, "1", None])
def test_another_schema_is_refused_before_its_fields_are_looked_at(edit, tmp_path: Path, number: object) -> None:
    edit(lambda data: data.update(schema_number=number, something_new=1))
    with pytest.raises(InputError, match=f"has schema {number}, this llmopt reads 1") as caught:
        Manifest.load(tmp_path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda data: data.pop("verdict"), "verdict: Field required"),
        (lambda data: data.update(something_new=1), "something_new: Extra inputs"),
        (lambda data: data["verdict"].update(status="fine"), r"verdict\.status: "),
        (lambda data: data["files"]["tokenizer.json"].update(bytes="many"), r"files\.tokenizer\.json\.bytes: "),
    ],
)
def test_a_damaged_field_is_named(edit, tmp_path: Path, change, where: str) -> None:
    edit(change)
    with pytest.raises(VerificationError, match=rf"manifest\.json is damaged: {where}"):
        Manifest.load(tmp_path)


def test_a_missing_file_is_found_on_every_start(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(VerificationError, match=r"was changed: tokenizer\.json is missing") as caught:
        Manifest.load(tmp_path)
    assert caught.value.exit_code == 6


def test_a_changed_size_is_found_on_every_start(manifest: Manifest, tmp_path: Path) -> None:
    with (tmp_path / "engine/model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(VerificationError, match=r"engine/model\.onnx has 1701 bytes instead of 1700"):
        Manifest.load(tmp_path)


def test_a_changed_byte_is_found_when_digests_are_compared(manifest: Manifest, tmp_path: Path) -> None:
    content = bytearray((tmp_path / "engine/model.onnx").read_bytes())
    content[1000] ^= 1
    (tmp_path / "engine/model.onnx").write_bytes(content)
    assert Manifest.load(tmp_path) == manifest
    with pytest.raises(VerificationError, match=r"engine/model\.onnx was changed: its sha256 is not the manifest's"):
        Manifest.load(tmp_path, verify=True)


def test_every_file_that_differs_is_named(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "engine/model.onnx").write_bytes(b"")
    with pytest.raises(VerificationError, match=r"model\.onnx has 0 bytes .*; tokenizer\.json is missing"):
        Manifest.load(tmp_path)
