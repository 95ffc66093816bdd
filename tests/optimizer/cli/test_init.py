"""``llmopt init``: the recipe it writes loads, fits the model, and replaces nothing unasked."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmopt.optimizer.cli.main import main
from llmopt.optimizer.recipe import Recipe
from llmopt.optimizer.recipe_template import fitting_group_size, input_widths
from llmopt.optimizer.scheme import PRESETS
from llmopt.optimizer.sources import load_model


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["init", *args])
    return ended.value.code


def checkpoint(folder: Path, *, hidden: int = 576, inner: int = 1536, attended: int = 576) -> Path:
    """A Llama's config and linears of one layer, with ``attended`` columns entering the last of attention's."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    shapes = {
        "self_attn.q_proj": (attended, hidden),
        "self_attn.o_proj": (hidden, attended),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    weights = {f"model.layers.0.{name}.weight": np.zeros(shape, np.int8) for name, shape in shapes.items()}
    save_file(weights | {"model.norm.weight": np.zeros(7, np.int8)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("scheme", PRESETS)
@pytest.mark.parametrize("model", ["pypi:name==1.0/path/m.gguf", "org/name@12fd25f", "odd name: ${x} #1", "3"])
def test_the_recipe_loads_and_names_the_model_as_given(scheme: str, model: str) -> None:
    assert run(model, "--scheme", scheme) == 0
    recipe = Recipe.load(Path("recipe.yaml"))
    assert recipe.model == model
    (named,) = recipe.passes
    assert named.instance.scheme == PRESETS[scheme]
    assert [gate.metric for gate in recipe.accept] == ["kl"]


def test_every_line_that_is_commented_out_is_valid_too(folder: Path) -> None:
    (folder / "holdout.txt").write_text("text")
    assert run("org/name@1234567") == 0
    lines = Path("recipe.yaml").read_text().splitlines()
    options = ("# overrides:", "#   - {match:", "# - {metric:", "# resources:")
    used = [line.replace("# ", "", 1) if line.strip().startswith(options[:1] + options[2:]) else line for line in lines]
    used = [line.replace("#   - {match", "  - {match") for line in used]
    assert used != lines
    Path("recipe.yaml").write_text("\n".join(used))
    recipe = Recipe.load(Path("recipe.yaml"))
    assert len(recipe.passes[0].instance.overrides) == 1
    assert len(recipe.accept) == 2
    assert recipe.resources.threads == 2


@pytest.mark.parametrize(
    ("widths", "size"),
    [
        ({}, 32),
        ({"hidden": 48}, 16),
        ({"hidden": 24}, -1),
        ({"attended": 80}, 16),
    ],
)
def test_the_group_size_fits_the_widths_of_a_local_model(folder: Path, widths: dict[str, int], size: int) -> None:
    checkpoint(folder / "model", **widths)
    assert run("model", "--scheme", "W4A16") == 0
    assert Recipe.load(Path("recipe.yaml")).passes[0].instance.group_size == size


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"architectures": ["MambaForCausalLM"]}'])
def test_a_model_whose_widths_cannot_be_read_gets_the_default(folder: Path, text: str) -> None:
    (checkpoint(folder / "model", hidden=24) / "config.json").write_text(text)
    assert run("model", "--scheme", "W4A16") == 0
    assert Recipe.load(Path("recipe.yaml")).passes[0].instance.group_size == 32


def test_a_scheme_without_groups_gets_no_group_size() -> None:
    assert run("org/name", "--scheme", "W8A8") == 0
    assert "group_size" not in Path("recipe.yaml").read_text()


def test_the_widths_of_every_family_are_those_of_its_linears(
    family_name: str, family_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_model(str(family_of(family_name)), cache=tmp_path)
    linears = {model.weights[model.weight_of(name)].shape[1] for name in model.linears()}
    assert linears <= (input_widths(family_of(family_name)) or set())
    assert (input_widths(family_of(family_name)) or set()) - linears <= {model.decoder.hidden_size}


@pytest.mark.parametrize(("widths", "size"), [({64, 96}, 32), ({64, 80}, 16), ({64, 72}, None), ({4096}, 32)])
def test_a_fitting_group_size_divides_all_widths(widths: set[int], size: int | None) -> None:
    assert fitting_group_size(widths) == size


def test_a_relative_model_is_written_as_seen_from_the_recipe(folder: Path) -> None:
    checkpoint(folder / "models/small")
    (folder / "recipes").mkdir()
    assert run("models/small", "-o", "recipes/small.yaml") == 0
    recipe = Recipe.load(Path("recipes/small.yaml"))
    assert recipe.model == "../models/small"
    assert (recipe.base / recipe.model / "config.json").exists()
    assert run("models/small") == 0
    assert Recipe.load(Path("recipe.yaml")).model == "./models/small"
    assert run(str(folder / "models/small"), "--force") == 0
    assert Recipe.load(Path("recipe.yaml")).model == str(folder / "models/small")


def test_an_existing_file_is_replaced_only_when_forced(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text("mine")
    assert run("org/name") == 2
    assert capsys.readouterr().err == "error: recipe.yaml exists\nhint: --force replaces it, -o chooses another name\n"
    assert Path("recipe.yaml").read_text() == "mine"
    assert run("org/name", "--force") == 0
    assert Recipe.load(Path("recipe.yaml")).model == "org/name"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["./nowhere"], "error: there is no model ./nowhere"),
        (["nowhere.gguf"], "error: there is no model nowhere.gguf"),
        (["org/name", "--scheme", "W5A16"], "error: unknown scheme 'W5A16'\nhint: did you mean 'W8A16'?"),
        (["org/name", "-o", "no/such/recipe.yaml"], "error: there is no directory no/such"),
        (["org/name", "-o", "."], "error: "),
    ],
)
def test_what_cannot_be_written_is_refused(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*args) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not Path("recipe.yaml").exists()


def test_a_damaged_gguf_file_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    Path("m.gguf").write_bytes(b"no gguf at all")
    assert run("m.gguf", "--scheme", "W4A16") == 2
    assert "m.gguf is not a GGUF file" in capsys.readouterr().err
