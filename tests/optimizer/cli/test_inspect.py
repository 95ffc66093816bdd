"""`llmopt inspect`: what it shows of a build, and that a build that was changed is told."""

import json
import re
import shutil
from pathlib import Path

import pytest

from llmopt.optimizer.build import build
from llmopt.optimizer.cli.main import main
from llmopt.optimizer.manifest import CalibrationEntry, Manifest, PassRecord
from llmopt.optimizer.progress import Silent
from llmopt.optimizer.recipe import Recipe


@pytest.fixture(scope="module")
def built(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build in W4A16 with an int8 head and one linear in float. Tests must not change it."""
    folder = tmp_path_factory.mktemp("built")
    settings = {
        "version": 1,
        "model": str(tiny_llama),
        "passes": [
            {
                "round_to_nearest": {
                    "scheme": "W4A16",
                    "group_size": 32,
                    "overrides": [{"match": "model.layers.1.mlp.down_proj", "scheme": "none"}],
                }
            }
        ],
        "export": [{"onnx": {"target": "cpu"}}],
        "accept": [{"metric": "kl", "max": 10, "windows": 2, "tokens": 32}],
        "resources": {"threads": 1},
    }
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMOPT_CACHE", str(folder / "cache"))
        build(Recipe.load(folder / "recipe.yaml"), folder / "it", cache=folder / "cache", progress=Silent())
    return folder / "it"


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    shutil.copytree(built, tmp_path / "it")
    return tmp_path / "it"


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]):
    """Runs the command; returns exit code, stdout and stderr."""

    def inspect_(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["inspect", *map(str, args)])
        shown = capsys.readouterr()
        return ended.value.code, shown.out, shown.err

    return inspect_


def rows(text: str) -> list[list[str]]:
    """The cells of every table row in ``text``."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_layers_passes_measurements_and_the_verdict_are_shown(inspect, built: Path, tiny_llama: Path) -> None:
    code, shown, error = inspect(built)
    assert (code, error) == (0, "")
    manifest = Manifest.load(built)
    assert f"model    {tiny_llama} (llama)\n" in shown
    assert f"source   sha256 {manifest.source.digest}\n" in shown
    assert "engine   engine/model.onnx: onnx for cpu, 3 layers, up to 256 tokens\n" in shown
    assert "gates: accepted" in shown
    found = {row[0]: row[1:] for row in rows(shown)}
    assert {"round_to_nearest", "fuse_qkv", "lower_linear", "verify_lowering", "kl", "top1"} <= set(found)
    assert found["kl on sampled"][0] == "max 10"
    assert found["kl on sampled"][2] == "yes"


def test_layers_that_differ_only_in_their_number_are_one_row(inspect, built: Path) -> None:
    _, shown, _ = inspect(built)
    found = [row for row in rows(shown) if row[0].startswith(("model.layers", "lm_head", "all"))]
    assert ["model.layers.*.self_attn.q_proj", "3", "64x64", "W4A16 g32"] in [row[:4] for row in found]
    assert sorted(row[:4] for row in found if "down_proj" in row[0]) == [
        ["model.layers.*.mlp.down_proj", "2", "64x128", "W4A16 g32"],
        ["model.layers.1.mlp.down_proj", "1", "64x128", "float32"],
    ]
    assert ["lm_head", "1", "512x64"] in [row[:3] for row in found]
    total = sum(layer.bytes for layer in Manifest.load(built).layers)
    assert ["all", "22", "", "", f"{total / 1e6:.2f}", ""] in found


def test_every_layer_has_a_row_when_asked_for(inspect, built: Path) -> None:
    _, shown, _ = inspect(built, "--layers")
    found = {row[0]: row for row in rows(shown)}
    for layer in Manifest.load(built).layers:
        assert layer.scheme in found[layer.name]
        assert ("" if layer.error is None else f"{layer.error:.4f}") == found[layer.name][-1]


def test_json_is_the_manifest(inspect, built: Path) -> None:
    code, shown, _ = inspect(built, "--json")
    assert code == 0
    assert json.loads(shown) == json.loads((built / "manifest.json").read_text())


def test_notes_and_fallbacks_are_shown_as_they_were_written(inspect, copy: Path) -> None:
    record = PassRecord(name="talk", changed=False, notes=["weights are [out, in]"], fallbacks=["[b] float :fox:"])
    Manifest.load(copy).model_copy(update={"passes": [record]}).save(copy)
    _, shown, _ = inspect(copy)
    assert ["talk", "", "fallback: [b] float :fox:"] in rows(shown)
    assert ["", "", "weights are [out, in]"] in rows(shown)


def test_calibration_text_and_what_it_reached_are_shown(inspect, copy: Path) -> None:
    manifest = Manifest.load(copy)
    text = CalibrationEntry(name="chat.jsonl", digest="ab" * 32, samples=4, tokens=32, packing="pad", seed=7)
    coverage = {
        "tokens": 90,
        "lengths": {"17-32": 4},
        "modules": {"count": 21, "tokens": 90},
        "others": {},
        "unreached": [],
        "experts": {"model.layers.0": [80, 0, 10]},
    }
    record = manifest.passes[0].model_copy(update={"details": {"coverage": coverage}})
    manifest.model_copy(update={"calibration": text, "passes": [record]}).save(copy)
    _, shown, _ = inspect(copy)
    assert "text     chat.jsonl: 4 windows of 32 tokens, one document each, seed 7" in shown
    assert "21 modules saw 90 tokens of text" in shown
    assert "3 experts saw 0 to 80 tokens, 1 of them none" in shown
    page = copy.parent / "page.html"
    inspect(copy, "--html", page)
    html = page.read_text()
    assert "Calibration text" in html
    assert "ab" * 32 in html
    assert re.search(r'model.layers.0<td class="n">3<td class="n">0<td class="n">80\s*<td>1</tr>', html)


def test_how_well_a_pass_kept_the_function_is_shown(inspect, copy: Path) -> None:
    found = {"embedding and head": 0.0, "model.layers.0": 2e-6, "model.layers.2": 1e-6}
    record = PassRecord(name="rescale", changed=True, details={"verification": found})
    Manifest.load(copy).model_copy(update={"passes": [record]}).save(copy)
    _, shown, _ = inspect(copy)
    notes = " ".join(row[-1] for row in rows(shown))
    assert "keeps the function: 3 parts; largest difference 2e-06: model.layers.0" in notes


@pytest.mark.parametrize("args", [["--layers"], ["--graph"]])
def test_nothing_is_cut_or_folded_where_there_is_no_terminal(inspect, copy: Path, monkeypatch, args: list[str]) -> None:
    """Eighty columns are what rich takes where it cannot ask."""
    monkeypatch.setenv("COLUMNS", "80")
    name, reason = f"fuse_{'long' * 30}", "words of a sentence " * 20
    operators = {"before": {"Long" * 30: 1}, "after": {"com.microsoft::" + "Longer" * 30: 2}}
    details = {"applied": 1, "declined": [reason.strip()], "operators": operators}
    manifest = Manifest.load(copy)
    layers = [layer.model_copy(update={"name": f"{'part.' * 30}{i}"}) for i, layer in enumerate(manifest.layers)]
    records = {"engine/model.onnx": [PassRecord(name=name, changed=True, details=details)]}
    manifest.model_copy(update={"layers": layers, "graph_passes": records}).save(copy)
    code, shown, _ = inspect(copy, *args)
    assert code == 0
    assert "…" not in shown
    whole = [name, reason.strip(), "com.microsoft::" + "Longer" * 30] if args == ["--graph"] else [layers[0].name, name]
    for words in whole:
        assert any(words in line for line in shown.splitlines()), words


@pytest.fixture
def with_operators(copy: Path) -> Path:
    """A copy of the build whose engine of 3 layers went through two passes that counted operators."""
    first = {"before": {"Mul": 6, "Sigmoid": 3, "MatMul": 21}, "after": {"QuickGelu": 3, "Mul": 3, "MatMul": 21}}
    second = {"before": first["after"], "after": {"QuickGelu": 3, "Mul": 3, "com.microsoft::MatMulNBits": 1021}}
    declined = ["no kernel for [half]", "no kernel for [half]", "in a loop"]
    records = [
        PassRecord(name="fuse_silu", changed=True, details={"applied": 3, "declined": declined, "operators": first}),
        PassRecord(name="lower_linear", changed=True, details={"applied": 21, "declined": [], "operators": second}),
        PassRecord(name="verify_lowering", changed=False, details={"layers.0": 1e-7}),
    ]
    Manifest.load(copy).model_copy(update={"graph_passes": {"engine/model.onnx": records}}).save(copy)
    return copy


def test_graph_shows_operators_before_and_after_each_pass(inspect, with_operators: Path) -> None:
    code, shown, error = inspect(with_operators, "--graph")
    assert (code, error) == (0, "")
    found = rows(shown)
    first, second = found.index(["fuse_silu", "3", "30 → 27"]), found.index(["lower_linear", "21", "27 → 1,027"])
    assert found[first + 1] == ["-3 Mul, -3 Sigmoid, +3 QuickGelu", "", ""]
    assert found[second + 1] == ["-21 MatMul, +1021 MatMulNBits", "", ""]
    assert "verify_lowering" not in shown


def test_graph_shows_why_near_matches_were_declined(inspect, with_operators: Path) -> None:
    _, shown, _ = inspect(with_operators, "--graph")
    assert "fuse_silu declined 2: no kernel for [half]\n" in shown
    assert "fuse_silu declined 1: in a loop\n" in shown


def test_graph_shows_the_engines_operators_per_decoder_layer(inspect, with_operators: Path) -> None:
    _, shown, _ = inspect(with_operators, "--graph")
    found = rows(shown)
    assert found[-4:] == [
        ["com.microsoft::MatMulNBits", "1,021", "340.33"],
        ["Mul", "3", "1.00"],
        ["QuickGelu", "3", "1.00"],
        ["all", "1,027", "342.33"],
    ]


def test_graph_of_a_build_that_counted_no_operators_is_told(inspect, copy: Path) -> None:
    record = PassRecord(name="fuse_silu", changed=True, details={"applied": 3, "declined": []})
    Manifest.load(copy).model_copy(update={"graph_passes": {"engine/model.onnx": [record]}}).save(copy)
    code, _, error = inspect(copy, "--graph")
    assert code == 2
    assert error == (
        "error: the manifest does not say how many operators engine/model.onnx has\n"
        "hint: build it again with this llmopt\n"
    )


def test_html_is_the_builds_report_with_its_files_and_cost(inspect, built: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    assert inspect(built, "--html", file) == (0, f"{file}: the report of {built}\n", "")
    html = file.read_text()
    manifest = Manifest.load(built)
    for words in (manifest.files["engine/model.onnx"].sha256, "to build,", "model.layers.2.mlp.down_proj"):
        assert words in html
    report = (built / "report.html").read_text()
    assert manifest.files["engine/model.onnx"].sha256 not in report
    assert "model.layers.2.mlp.down_proj" in report


def test_html_of_a_build_without_its_record_is_written_too(inspect, copy: Path, tmp_path: Path) -> None:
    (copy / "build-record.json").unlink()
    assert inspect(copy, "--html", tmp_path / "page.html")[0] == 0
    assert "to build," not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(("name", "said"), [("none/page.html", "is no directory"), (".", "is a directory")])
def test_a_page_that_cannot_be_written_is_told_before_the_build_is_read(
    inspect, tmp_path: Path, name: str, said: str
) -> None:
    code, shown, error = inspect(tmp_path / "no build", "--html", tmp_path / name)
    assert (code, shown) == (2, "")
    assert said in error


def test_verify_says_how_many_files_it_compared(inspect, built: Path) -> None:
    code, shown, _ = inspect(built, "--verify")
    assert code == 0
    assert shown.endswith(f"verified: {len(Manifest.load(built).files)} files are what the manifest says\n")


@pytest.mark.parametrize("name", ["engine/model.onnx.data", "tokenizer.json", "report.html"])
def test_a_changed_byte_is_found_by_verify(inspect, copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    assert inspect(copy)[0] == 0
    code, shown, error = inspect(copy, "--verify")
    assert (code, shown) == (6, "")
    assert error == (
        f"error: {copy} was changed: {name} was changed: its sha256 is not the manifest's\n"
        "hint: build it again, or restore it\n"
    )


def test_a_changed_size_or_a_missing_file_is_found_without_verify(inspect, copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with (copy / "engine/model.onnx").open("ab") as file:
        file.write(b"x")
    code, _, error = inspect(copy)
    assert code == 6
    assert "engine/model.onnx has " in error
    assert "tokenizer.json is missing" in error


@pytest.mark.parametrize("args", [[], ["--json"], ["--verify"]])
def test_what_is_no_build_is_told(inspect, tmp_path: Path, args: list[str]) -> None:
    code, shown, error = inspect(tmp_path / "nowhere", *args)
    assert (code, shown) == (2, "")
    assert error.startswith(f"error: {tmp_path / 'nowhere'} is not a build: it has no manifest.json\nhint: ")


def test_a_damaged_manifest_is_told(inspect, copy: Path) -> None:
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text()[:-100])
    code, _, error = inspect(copy)
    assert code == 6
    assert "manifest.json is damaged: " in error
    assert error.endswith("hint: build it again\n")


def test_a_build_of_another_schema_is_told(inspect, copy: Path) -> None:
    data = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**data, "schema_number": 2}))
    code, _, error = inspect(copy)
    assert code == 2
    assert "manifest.json has schema 2, this llmopt reads 1\nhint: build it again with this version\n" in error


def test_a_model_shows_its_layers(tiny_llama_bf16: Path, inspect) -> None:
    code, out, _ = inspect(tiny_llama_bf16)
    assert code == 0
    assert f"{tiny_llama_bf16} (llama)" in out.replace("\n", "")
    assert re.search(r"model\.layers\.\*\.mlp\.up_proj.*3.*128x64.*bfloat16", out)


def test_a_models_layers_are_json_too(tiny_llama: Path, inspect) -> None:
    code, out, _ = inspect(tiny_llama, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["architecture"] == "llama"
    assert found["layers"][-1] == {"name": "lm_head", "shape": [512, 64], "scheme": "float32", "bytes": 512 * 64 * 4}


@pytest.mark.parametrize("option", ["--graph", "--verify", "--html=page.html"])
def test_what_only_builds_have_is_refused_for_a_model(option: str, tiny_llama: Path, inspect) -> None:
    code, _, err = inspect(tiny_llama, option)
    assert code == 2
    assert "is for builds" in err
