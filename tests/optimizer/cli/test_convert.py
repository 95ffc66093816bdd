"""`llmopt convert`: the same integers in another format, or a clear sentence and nothing written."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmopt.exporters.checkpoint.exporter import Checkpoint
from llmopt.optimizer.cli.main import main
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.sources import load_model
from llmopt.passes.round_to_nearest import RoundToNearest


@pytest.fixture(scope="module")
def quantized(llama_of, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 checkpoint in GPTQ's format, 4 bits. Tests must not change it."""
    folder = tmp_path_factory.mktemp("gptq")
    source = llama_of(dtype="float16", tie_word_embeddings=False)
    model = load_model(str(source), cache=folder / "cache")
    made = RoundToNearest(scheme="W4A16", group_size=16, head="none").run(model, PassContext())
    Checkpoint(format="gptq").write(made, folder / "it", PassContext())
    return folder / "it"


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]):
    """Runs the command; returns exit code, stdout and stderr."""

    def convert_(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["convert", *map(str, args)])
        shown = capsys.readouterr()
        return ended.value.code, shown.out, shown.err

    return convert_


def test_there_and_back_is_the_same_file(quantized: Path, convert, tmp_path: Path) -> None:
    code, out, _ = convert(quantized, "--to", "compressed-tensors", "-o", tmp_path / "between", "-q")
    assert code == 0
    assert f"{tmp_path / 'between'}: compressed-tensors" in out.replace("\n", "")
    code, _, _ = convert(tmp_path / "between", "--to", "gptq", "-o", tmp_path / "last", "-q")
    assert code == 0
    assert (tmp_path / "last/model.safetensors").read_bytes() == (quantized / "model.safetensors").read_bytes()
    assert {path.name for path in (tmp_path / "last").iterdir()} == {path.name for path in quantized.iterdir()}


def test_floats_are_those_that_the_integers_stand_for(quantized: Path, convert, tmp_path: Path) -> None:
    code, _, _ = convert(quantized, "--to", "safetensors", "--dtype", "float32", "-o", tmp_path / "floats")
    assert code == 0
    name = "model.layers.0.mlp.down_proj.weight"
    expected = load_model(str(quantized), cache=tmp_path / "cache").weights[name].dense()
    assert load_file(tmp_path / "floats/model.safetensors")[name].equal(expected)
    assert "quantization_config" not in json.loads((tmp_path / "floats/config.json").read_text())


def test_a_format_without_a_place_for_the_integers_is_refused(quantized: Path, convert, tmp_path: Path) -> None:
    code, _, err = convert(quantized, "--to", "fp8", "-o", tmp_path / "out")
    assert code == 5
    assert "model.layers.0.self_attn.q_proj is quantized to W4A16 g16 in the model" in err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_floats_are_not_quantized_on_the_way(tiny_llama: Path, convert, tmp_path: Path) -> None:
    code, _, err = convert(tiny_llama, "--to", "gptq", "-o", tmp_path / "out")
    assert code == 2
    assert "convert does not quantize" in err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_what_exists_is_replaced_by_force_alone_and_only_a_checkpoint(quantized: Path, convert, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert convert(quantized, "--to", "gptq_v2", "-o", out)[0] == 0  # an empty directory is as good as none
    code, _, err = convert(quantized, "--to", "gptq", "-o", out)
    assert (code, "--force" in err) == (2, True)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq_v2"
    assert convert(quantized, "--to", "gptq", "-o", out, "--force")[0] == 0
    assert json.loads((out / "config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq"
    (out / "config.json").unlink()
    code, _, err = convert(quantized, "--to", "gptq", "-o", out, "--force")
    assert (code, "is no checkpoint" in err) == (2, True)


def test_a_checkpoint_does_not_replace_itself(quantized: Path, convert) -> None:
    before = (quantized / "model.safetensors").read_bytes()
    code, _, err = convert(quantized, "--to", "gptq_v2", "-o", quantized)
    assert (code, "exists" in err) == (2, True)
    assert (quantized / "model.safetensors").read_bytes() == before


def test_gguf_keeps_integers_whose_grid_it_has_and_rounds_floats_to_a_type(llama_of, convert, tmp_path: Path) -> None:
    model = load_model(str(llama_of(tie_word_embeddings=False)), cache=tmp_path / "cache")
    made = RoundToNearest(scheme="W4A16", group_size=32, head="none").run(model, PassContext())
    Checkpoint(format="gptq").write(made, tmp_path / "gptq", PassContext())
    code, _, _ = convert(tmp_path / "gptq", "--to", "gguf", "--type", "F16", "-o", tmp_path / "out", "-q")
    assert code == 0
    again = load_model(str(tmp_path / "out/model-F16.gguf"), cache=tmp_path / "cache")
    source = load_model(str(tmp_path / "gptq"), cache=tmp_path / "cache")
    name = "model.layers.1.mlp.down_proj.weight"
    assert again.weights[name].dense().equal(source.weights[name].dense())
    assert convert(tmp_path / "gptq", "--to", "gguf", "-o", tmp_path / "out", "-q")[0] == 2  # exists
    assert convert(tmp_path / "gptq", "--to", "gguf", "-o", tmp_path / "out", "--force", "-q")[0] == 0
    assert [path.name for path in (tmp_path / "out").glob("*.gguf")] == ["model-Q8_0.gguf"]


def test_groups_that_are_no_blocks_of_gguf_are_refused(quantized: Path, convert, tmp_path: Path) -> None:
    code, _, err = convert(quantized, "--to", "gguf", "-o", tmp_path / "out")
    assert (code, "W4A16 g16 has another grid" in err.replace("\n", " ")) == (5, True)


@pytest.mark.parametrize("options", [("gguf", "--dtype", "float16"), ("gptq", "--type", "F16")])
def test_options_of_another_format_are_refused(options, quantized: Path, convert, tmp_path: Path) -> None:
    assert convert(quantized, "-o", tmp_path / "out", "--to", *options)[0] == 2
