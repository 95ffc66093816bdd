"""Recipes: what loads, and every mistake with its line, its words and its hint."""

import json
import textwrap
from pathlib import Path
from typing import ClassVar, Literal

import jsonschema
import pytest
from pydantic import Field
from ruamel.yaml import YAML

from llmopt.optimizer import loader
from llmopt.optimizer.contracts import Exporter, WeightPass
from llmopt.optimizer.errors import InputError, RecipeError
from llmopt.optimizer.recipe import Recipe
from llmopt.optimizer.scheme import PRESETS

HEAD = "version: 1\nmodel: ./model\n"
TAIL = "export:\n  - onnx: {target: cpu}\n"


class Merge(WeightPass):
    """A pass with the kinds of options that round_to_nearest does not have."""

    rank: int | Literal["auto"] = Field("auto", description="How many.")
    ratio: float = Field(0.5, ge=0, lt=1)
    names: dict[str, int] = Field({})

    def run(self, model: object, context: object) -> object:
        return model


class Checkpoint(Exporter):
    """An exporter whose result nothing executes."""

    folder: ClassVar[str] = "checkpoint"

    def check(self, model: object) -> None: ...

    def executors(self) -> list:
        return []

    def estimate(self, model: object) -> int:
        return 0

    def export(self, model: object, directory: object, context: object) -> object: ...


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass ``merge`` and an exporter ``checkpoint`` besides those of llmopt."""
    extra = {("passes", "merge"): Merge, ("exporters", "checkpoint"): Checkpoint}
    load, names = loader.load, loader.names
    monkeypatch.setattr(loader, "load", lambda kind, name: extra.get((kind, name)) or load(kind, name))
    monkeypatch.setattr(
        loader, "names", lambda kind: names(kind) | {name: "Doc." for its, name in extra if its == kind}
    )


@pytest.fixture
def write(tmp_path: Path):
    def write_(text: str) -> Path:
        path = tmp_path / "r.yaml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write_


@pytest.fixture
def load(write, tmp_path: Path):
    def load_(text: str, *overrides: str) -> Recipe:
        return Recipe.load(write(text), overrides)

    return load_


@pytest.fixture
def mistakes(load, tmp_path: Path):
    """What ``Recipe.load`` says, a string for each problem, with the file's folder removed."""

    def mistakes_(text: str, *overrides: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        assert caught.value.exit_code == 2
        return [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]

    return mistakes_


def test_a_recipe_holds_objects_and_defaults(load, tmp_path: Path) -> None:
    recipe = load(HEAD + "passes:\n  - round_to_nearest: {scheme: W8A8}\n" + TAIL)
    (weight_pass,) = recipe.passes
    assert weight_pass.name == "round_to_nearest"
    assert weight_pass.instance.scheme == PRESETS["W8A8"]
    (exporter,) = recipe.export
    assert [target.name for target in exporter.instance.executors()] == ["cpu"]
    assert (recipe.version, recipe.model, recipe.verify, recipe.strict, recipe.seed) == (
        1,
        "./model",
        "quick",
        False,
        0,
    )
    assert recipe.accept == ()
    assert recipe.calibration is None
    assert recipe.resources.threads is None
    assert recipe.base == tmp_path


def test_a_recipe_is_frozen(load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(HEAD + TAIL).seed = 1


def test_a_name_without_options_may_stand_alone(load) -> None:
    alone = load(HEAD + "export: [onnx]\n")
    assert alone == load(HEAD + "export:\n  - onnx:\n") == load(HEAD + "export:\n  - onnx: {}\n")


def test_all_keys_of_the_design_are_accepted(load, tmp_path: Path) -> None:
    (tmp_path / "holdout.txt").write_text("some text")
    (tmp_path / "chat.jsonl").write_text("{}")
    recipe = load(
        """\
        version: 1
        model: pypi:name==1.0/path/model.gguf
        calibration: {source: chat.jsonl, field: messages, samples: 128, tokens: 1024}
        passes:
          - round_to_nearest: {scheme: W4A16, group_size: 32, overrides: [{match: "re:.*down_proj$", scheme: W8A16}]}
        export:
          - onnx: {target: cpu}
        accept:
          - {metric: kl, max: 0.02}
          - {metric: perplexity, data: holdout.txt, max_increase: 3%}
        verify: full
        strict: true
        resources: {max_ram_gb: 12, threads: 2}
        seed: 7
        """
    )
    assert recipe.accept[1].max_increase == pytest.approx(0.03)
    assert recipe.resources.max_ram_gb == 12
    assert recipe.resources.activation_bytes == 1 << 30
    assert recipe.resources.model_copy(update={"max_ram_gb": 2.0}).activation_bytes == 250_000_000
    assert recipe.calibration.source == "chat.jsonl"


def test_the_resolved_recipe_is_plain_deterministic_and_a_recipe_itself(load, tmp_path: Path) -> None:
    (tmp_path / "holdout.txt").write_text("some text")
    text = (
        HEAD + "passes:\n  - round_to_nearest: {scheme: W4A16, group_size: 64}\n" + TAIL + "accept:\n"
        "  - {metric: perplexity, data: holdout.txt, max_increase: 3%}\n"
    )
    recipe = load(text)
    resolved = recipe.resolved()
    assert json.dumps(resolved, sort_keys=True) == json.dumps(load(text).resolved(), sort_keys=True)
    assert str(tmp_path) not in json.dumps(resolved)
    assert resolved["accept"][0]["data"] == "holdout.txt"
    assert load(json.dumps(resolved)) == recipe


def test_merge_keys_and_aliases_work_in_a_recipe(load) -> None:
    recipe = load(
        HEAD
        + """\
passes:
  - round_to_nearest:
      scheme: &form
        weights: &w {num_bits: 8, strategy: channel}
      overrides:
        - {match: a, scheme: *form}
        - {match: b, scheme: {weights: {<<: *w, num_bits: 4}}}
"""
        + TAIL
    )
    schemes = [each.scheme.weights.num_bits for each in recipe.passes[0].instance.overrides]
    assert schemes == [8, 4]


def test_three_different_mistakes_are_reported_together_with_their_lines() -> None:
    file = Path(__file__).parents[1] / "data/three-mistakes.yaml"
    with pytest.raises(RecipeError, match="the recipe has 3 mistakes") as caught:
        Recipe.load(file)
    assert [str(problem).removeprefix(str(file)) for problem in caught.value.problems] == [
        ":7: passes.0.round_to_nearest.gruop_size: unknown option 'gruop_size'  hint: did you mean 'group_size'?",
        ":9: export.0: no exporter named 'onxx'  hint: did you mean 'onnx'?",
        ":10: seed: must be a whole number, not the text '0'  hint: remove the quotes",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('seed: "0"', "seed: must be a whole number, not the text '0'  hint: remove the quotes"),
        ("seed: 1_000", "seed: must be a whole number, not the text '1_000'"),
        ("seed: 1.0", "seed: must be a whole number, not 1.0  hint: write 1"),
        ("seed: true", "seed: must be a whole number, not true"),
        ("seed: -1", "seed: must be at least 0, not -1"),
        ("seed: 99999999999", "seed: must be at most 4294967295, not 99999999999"),
        ("seed:", "seed: must be a whole number, not nothing  hint: give a value, or remove the line"),
        ("seed: .nan", "seed: must be a whole number, not nan"),
        ("strict: yes", "strict: must be true or false, not the text 'yes'  hint: write true"),
        ("strict: off", "strict: must be true or false, not the text 'off'  hint: write false"),
        ('strict: "true"', "strict: must be true or false, not the text 'true'  hint: remove the quotes"),
        ("strict: 1", "strict: must be true or false, not 1"),
        (
            "verify: quik",
            "verify: must be 'none', 'quick' or 'full', not the text 'quik'  hint: did you mean 'quick'?",
        ),
        ("verify: false", "verify: must be 'none', 'quick' or 'full', not false"),
        ("resources: 2", "resources: must be a mapping (key: value), not 2"),
        ("resources: {threads: 0}", "resources.threads: must be greater than 0, not 0"),
        ("resources: {thread: 2}", "resources.thread: unknown option 'thread'  hint: did you mean 'threads'?"),
        ("resources: {max_ram_gb: .inf}", "resources.max_ram_gb: must be a finite number, not inf"),
        ("resources: [threads]", "resources: must be a mapping (key: value), not a list"),
        ("calibration: {samples: ten}", "calibration.samples: must be a whole number, not the text 'ten'"),
        ("calibration: {source: 5}", "calibration.source: must be text, not 5  hint: put it in quotes"),
        ("accept: {metric: kl, max: 1}", "accept: must be a list, not a mapping  hint: start each item with '- '"),
        ("accept: [kl]", "accept.0: must be a mapping (key: value), not the text 'kl'"),
        ("accept: [{max: 1}]", "accept.0.metric: is missing  hint: kl: mean KL divergence"),
        (
            "accept: [{metric: ppl, max: 1}]",
            "accept.0.metric: must be 'kl', 'top1', 'perplexity', 'cosine' or 'min_cosine', not the text 'ppl'",
        ),
        ("accept: [{metric: kl}]", "accept.0: metric kl takes exactly one of: max"),
        ("accept: [{metric: top1, max: 1}]", "accept.0: metric top1 takes exactly one of: min"),
        ("accept: [{metric: top1, min: 99}]", "accept.0.min: must be at most 1, not 99"),
        ("accept: [{metric: perplexity, max: 9}]", "accept.0: perplexity needs data: on sampled text it says little"),
        ("accept: [{metric: kl, max: .inf}]", "accept.0.max: must be a finite number, not inf"),
        ("accept: [{metric: kl, max: '1'}]", "accept.0.max: must be a number, not the text '1'  hint: remove the quo"),
        ("mdoel: x", "mdoel: unknown option 'mdoel'  hint: did you mean 'model'?"),
        ("quantize: x", "quantize: unknown option 'quantize'  hint: known: accept, calibration, export, model, passes"),
        ("modèle: x", "modèle: unknown option 'modèle'  hint: did you mean 'model'?"),
        ("1: x", "the key 1 is not text"),
        ("model: y", "model: the key is given twice, first on line 2  hint: remove one"),
    ],
)
def test_a_wrong_setting_is_explained_at_its_line(mistakes, line: str, message: str) -> None:
    found = mistakes(f"{HEAD}{TAIL}{line}\n")
    assert len(found) == 1
    assert found[0].startswith(f"r.yaml:5: {message}")


@pytest.mark.parametrize(
    ("item", "line", "message"),
    [
        ("awqq", 4, "passes.0: no pass named 'awqq'"),
        ("round-to-nearest: {scheme: W8A8}", 4, "passes.0: no pass named 'round-to-nearest'  hint: did you mean"),
        ("onnx", 4, "passes.0: no pass named 'onnx'  hint: onnx is an exporter: it belongs under export"),
        ("fuse_qkv", 4, "passes.0: no pass named 'fuse_qkv'  hint: fuse_qkv is a graph pass"),
        ("5", 4, "passes.0: must be a name, or name: {options}, not 5"),
        ("", 4, "passes.0: must be a name, or name: {options}, not nothing"),
        ("{}", 4, "passes.0: must be a name, or name: {options}, not nothing"),
        ("[round_to_nearest]", 4, "passes.0: must be a name, or name: {options}, not a list"),
        ("round_to_nearest", 4, "passes.0.round_to_nearest.scheme: is missing"),
        ("round_to_nearest: W8A8", 4, "passes.0.round_to_nearest: the options of round_to_nearest must be a mapping"),
        (
            "round_to_nearest:\n    scheme: W8A8",
            5,
            "passes.0.scheme: has 2 keys, and an item names one thing: round_to_nearest, scheme  "
            "hint: indent the options of round_to_nearest further than its name",
        ),
        (
            "round_to_nearest: {scheme: W8A8}\n    merge: {}",
            5,
            "passes.0.merge: has 2 keys, and an item names one thing: round_to_nearest, merge  hint: give each its own",
        ),
        ("round_to_nearest:\n      scheme: W5A16", 5, "passes.0.round_to_nearest.scheme: unknown scheme 'W5A16'"),
        (
            "round_to_nearest:\n      scheme: W8A8\n      gruop_size: 1",
            6,
            "passes.0.round_to_nearest.gruop_size: unknown option 'gruop_size'  hint: did you mean 'group_size'?",
        ),
        (
            "round_to_nearest:\n      scheme:\n        weights:\n          num_bits: 5\n          strategy: channel",
            7,
            "passes.0.round_to_nearest.scheme.weights.num_bits: must be 2, 3, 4 or 8, not 5",
        ),
        (
            "round_to_nearest:\n      scheme:\n        weights: {num_bits: 4, strategy: channel,\n"
            "          group_sise: 5}",
            7,
            "passes.0.round_to_nearest.scheme.weights.group_sise: unknown option 'group_sise'  "
            "hint: did you mean 'group_size'?",
        ),
        (
            "round_to_nearest:\n      scheme: W8A16\n      overrides:\n        - match: a\n          scheme: W9",
            8,
            "passes.0.round_to_nearest.overrides.0.scheme: unknown scheme 'W9'",
        ),
        (
            "round_to_nearest:\n      scheme: W8A16\n      overrides:\n        - scheme: W8A8\n          match: 're:('",
            8,
            "passes.0.round_to_nearest.overrides.0.match: 're:(' is no regular expression",
        ),
        (
            "round_to_nearest:\n      scheme: W8A16\n      head:\n        weights: {num_bits: 8}",
            7,
            "passes.0.round_to_nearest.head.weights.strategy: is missing  hint: What shares one scale",
        ),
        ("merge: {rank: some}", 4, "passes.0.merge.rank: must be a whole number or 'auto', not the text 'some'"),
        ("merge: {ratio: 1}", 4, "passes.0.merge.ratio: must be less than 1, not 1"),
        ("merge: {ratio: 3%}", 4, "passes.0.merge.ratio: must be a number, not the text '3%'"),
        ("merge: {names: {a: x}}", 4, "passes.0.merge.names.a: must be a whole number, not the text 'x'"),
        ("merge: {names: []}", 4, "passes.0.merge.names: must be a mapping (key: value), not a list"),
    ],
)
def test_a_wrong_pass_is_explained_at_its_line(plugins, mistakes, item: str, line: int, message: str) -> None:
    found = mistakes(f"{HEAD}passes:\n  - {item}\n{TAIL}")
    assert len(found) == 1
    assert found[0].startswith(f"r.yaml:{line}: {message}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("passes:", "passes: must be a list, not nothing  hint: write passes: [] for none"),
        ("passes: round_to_nearest", "passes: must be a list, not the text 'round_to_nearest'  hint: start each item"),
        ("passes: {round_to_nearest: {}}", "passes: must be a list, not a mapping  hint: start each item with '- '"),
    ],
)
def test_passes_that_are_no_list_are_explained(mistakes, line: str, message: str) -> None:
    (found,) = mistakes(f"{HEAD}{line}\n{TAIL}")
    assert found.startswith(f"r.yaml:3: {message}")


@pytest.mark.parametrize(("text", "line"), [("", 1), ("export: []\n", 3)])
def test_a_recipe_that_exports_nothing_is_refused(mistakes, text: str, line: int) -> None:
    assert mistakes(HEAD + text) == [
        f"r.yaml:{line}: export: nothing to export: a recipe names at least one exporter  "
        "hint: as in - onnx: {target: cpu}"
    ]


def test_a_second_quantizer_is_refused_and_names_the_first(plugins, mistakes) -> None:
    text = f"""{HEAD}passes:
  - round_to_nearest: {{scheme: W8A16}}
  - merge
  - round_to_nearest: {{scheme: W8A16}}
{TAIL}"""
    (found,) = mistakes(text)
    assert found.startswith("r.yaml:6: passes.2.round_to_nearest: its linears are already quantized by passes.0.round_")


def test_a_second_quantizer_is_found_although_the_first_has_a_mistake(mistakes) -> None:
    found = mistakes(
        f"{HEAD}passes:\n  - round_to_nearest: {{scheme: W9}}\n  - round_to_nearest: {{scheme: W8}}\n{TAIL}"
    )
    assert [each.split(": ")[1] for each in found] == [
        "passes.0.round_to_nearest.scheme",
        "passes.1.round_to_nearest",
        "passes.1.round_to_nearest.scheme",
    ]


def test_a_pass_that_only_prepares_weights_may_stand_before_a_quantizer_and_not_behind(load, mistakes) -> None:
    prepares, rounds = "awq: {scheme: FP8, rounds: false}", "gptq: {scheme: W4A16, group_size: 32}"
    recipe = load(f"{HEAD}passes:\n  - {prepares}\n  - {rounds}\n{TAIL}")
    assert [step.name for step in recipe.passes] == ["awq", "gptq"]
    (found,) = mistakes(f"{HEAD}passes:\n  - {rounds}\n  - {prepares}\n{TAIL}")
    assert "passes.1.awq: its linears are already quantized by passes.0.gptq" in found


def test_a_scheme_that_a_target_cannot_run_is_refused_at_its_option(mistakes) -> None:
    found = mistakes(
        f"""{HEAD}passes:
  - round_to_nearest:
      scheme: W8A16
      overrides:
        - match: a
          scheme:
            weights: {{num_bits: 3, strategy: group, group_size: 24}}
        - match: b
          scheme: W4A16
        - match: c
          scheme: {{weights: {{num_bits: 8, strategy: block, block_structure: [128, 128]}}}}
{TAIL}"""
    )
    assert found == [
        "r.yaml:8: passes.0.round_to_nearest.overrides.0.scheme: "
        "the cpu target needs a group size that is a multiple of 16, not 24",
        "r.yaml:13: passes.0.round_to_nearest.overrides.2.scheme: "
        "the cpu target takes integers' scales per tensor, per channel or per group",
    ]


def test_a_scheme_refused_twice_for_one_option_is_reported_once(mistakes) -> None:
    """The head's scheme follows from the group size, so it is wrong for the same reason."""
    (found,) = mistakes(f"{HEAD}passes:\n  - round_to_nearest: {{scheme: W4A16, group_size: 24}}\n{TAIL}")
    assert found.startswith("r.yaml:4: passes.0.round_to_nearest.scheme: the cpu target needs a group size")


def test_a_scheme_that_only_linears_run_is_refused_for_experts(mistakes) -> None:
    (found,) = mistakes(f"{HEAD}passes:\n  - round_to_nearest:\n      scheme: W8A8\n      experts: W8A8\n{TAIL}")
    assert found == (
        "r.yaml:6: passes.0.round_to_nearest.experts: "
        "the cpu target has no kernel for experts that quantizes activations; W8A16 and W4A16 leave them"
    )


def test_schemes_are_free_where_nothing_executes_the_result(plugins, load) -> None:
    text = f"{HEAD}passes:\n  - round_to_nearest: {{scheme: W4A16, group_size: 24}}\nexport: [checkpoint]\n"
    assert load(text).passes[0].instance.group_size == 24


def test_gates_need_no_engine(plugins, load) -> None:
    assert load(f"{HEAD}export: [checkpoint]\naccept:\n  - {{metric: kl, max: 1}}\n").accept[0].max == 1


@pytest.mark.parametrize("options", ["{target: cpu}", "{capacity: 64}", "{flavor: llmopt}"])
def test_two_exports_of_one_kind_are_refused_whatever_their_options(mistakes, options: str) -> None:
    found = mistakes(f"{HEAD}export:\n  - onnx\n  - onnx: {options}\n")
    assert (
        "r.yaml:5: export.1.onnx: this kind is exported already, by export.0.onnx  "
        "hint: remove one: a build holds one export of each kind"
    ) in found


def test_two_flavors_are_not_of_one_kind(load) -> None:
    recipe = load(f"{HEAD}export:\n  - onnx\n  - onnx: {{flavor: genai}}\n")
    assert [item.instance.folder for item in recipe.export] == ["engine", "genai"]


def test_missing_and_empty_data_files_are_found_although_the_gate_has_another_mistake(mistakes, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    found = mistakes(
        f"""{HEAD}{TAIL}accept:
  - metric: perplexity
    max: "9"
    data: nope.txt
  - {{metric: kl, max: 1, data: empty.txt}}
  - {{metric: kl, max: 1, data: .}}
calibration:
  source: gone.jsonl
"""
    )
    assert [each.partition("  hint")[0] for each in found] == [
        "r.yaml:7: accept.0.max: must be a number, not the text '9'",
        "r.yaml:8: accept.0.data: there is no file nope.txt",
        "r.yaml:9: accept.1.data: empty.txt is empty",
        "r.yaml:10: accept.2.data: . is a directory",
        "r.yaml:12: calibration.source: there is no file gone.jsonl",
    ]


def test_a_bad_percentage_says_how_to_write_one(mistakes, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("x")
    (found,) = mistakes(f"{HEAD}{TAIL}accept: [{{metric: perplexity, data: t.txt, max_increase: x%}}]\n")
    assert found.endswith("accept.0.max_increase: 'x%' is no percentage  hint: write 3% or 0.03")


def test_missing_keys_are_reported_where_they_should_be(mistakes) -> None:
    assert [each[:24] for each in mistakes(TAIL)] == ["r.yaml:1: model: is miss", "r.yaml:1: version: is mi"]


def test_a_misspelt_key_is_not_reported_as_missing_too(mistakes) -> None:
    assert mistakes(f"version: 1\nmodle: x\n{TAIL}") == [
        "r.yaml:2: modle: unknown option 'modle'  hint: did you mean 'model'?"
    ]


@pytest.mark.parametrize("version", ["2", "'1'", "1.0", "true"])
def test_only_version_1_is_read(mistakes, version: str) -> None:
    (found,) = mistakes(f"version: {version}\nmodel: x\n{TAIL}")
    assert found.startswith("r.yaml:1: version: must be 1, not ")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n", "must be a mapping (key: value), not a list"),
        ("version", "must be a mapping (key: value), not the text 'version'"),
        ("a: [", "not valid YAML: "),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(mistakes, text: str, what: str) -> None:
    (found,) = mistakes(text)
    assert found.startswith(f"r.yaml:1: {what}")


def test_a_file_that_is_not_there_or_cannot_be_read_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no recipe"):
        Recipe.load(tmp_path / "none.yaml")
    with pytest.raises(InputError, match=r"cannot read the recipe .*: Is a directory"):
        Recipe.load(tmp_path)


def test_bytes_that_are_not_utf8_are_found_at_their_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"version: 1\nmodel: caf\xe9\n")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert str(caught.value.problems[0]) == f"{path}:2: is not UTF-8 text  hint: save it as UTF-8"


def test_half_a_surrogate_pair_is_refused(mistakes) -> None:
    (found,) = mistakes(f'version: 1\nmodel: "\\ud800"\n{TAIL}')
    assert found.startswith("r.yaml:2: ")


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(("\ufeff" + HEAD + TAIL).replace("\n", "\r\n").encode())
    assert Recipe.load(path).model == "./model"


# The schema that editors use.


def test_the_json_schema_is_valid_and_accepts_and_refuses_what_recipes_do(write) -> None:
    schema = Recipe.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)

    def errors(text: str) -> int:
        return len(list(validator.iter_errors(YAML(typ="safe", pure=True).load(text))))

    passes = "passes:\n  - round_to_nearest: "
    assert errors(HEAD + TAIL) == 0
    assert errors(HEAD + "export: [onnx]") == 0
    assert errors(HEAD + TAIL + passes + "{scheme: W4A16, group_size: 32, head: none}") == 0
    assert errors(HEAD + TAIL + passes + "{scheme: {weights: {num_bits: 8, strategy: channel}}}") == 0
    assert errors(HEAD + TAIL + "accept: [{metric: perplexity, data: x, max_increase: 3%}]") == 0
    assert errors(HEAD) == 1
    assert errors(HEAD + "export: []") == 1
    assert errors(TAIL + HEAD.replace("1", "2")) == 1
    assert errors(HEAD + TAIL + "sed: 1") == 1
    assert errors(HEAD + TAIL + passes + "{scheme: W5A16}") == 1
    assert errors(HEAD + TAIL + passes + "{scheme: W8A16, gruop_size: 1}") == 1
    assert errors(HEAD + TAIL + "passes: [round_to_nearest]") == 1
    assert errors(HEAD + TAIL + passes + "{scheme: W8A8}\n    onnx: {}") == 1


def test_every_option_in_the_schema_has_a_description_and_passes_are_found_by_name() -> None:
    schema = Recipe.json_schema()
    choices = schema["properties"]["passes"]["items"]["anyOf"]
    assert {name for each in choices for name in each.get("properties", {})} == set(loader.names("passes"))
    assert all("description" in each for each in schema["properties"].values())
    assert schema["properties"]["verify"]["enum"] == ["none", "quick", "full"]
    assert schema["properties"]["seed"]["default"] == 0


def test_definitions_of_two_passes_with_one_name_are_kept_apart(plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydantic import create_model

    override = create_model("Override", other=(int, 1))
    options = create_model("Merge", overrides=(list[override], []))
    monkeypatch.setattr(Merge, "model_json_schema", options.model_json_schema)
    schema = Recipe.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    text = HEAD + TAIL + "passes: [{merge: {overrides: [{other: x}]}}]"
    found = list(jsonschema.Draft202012Validator(schema).iter_errors(YAML(typ="safe", pure=True).load(text)))
    assert len(found) == 1
    assert {"Override", "passes.merge.Override"} <= set(schema["$defs"])


@pytest.mark.parametrize(
    ("step", "feature"),
    [
        ("rotate: {online: {down_proj: 64}}", "an online rotation"),
        ("kv_cache", "an int8 cache with a scale per channel"),
    ],
)
def test_what_a_checkpoint_has_no_place_for_is_refused_at_the_pass_that_makes_it(step, feature, mistakes) -> None:
    (found,) = mistakes(f"{HEAD}passes:\n  - {step}\nexport:\n  - checkpoint: {{}}\n")
    assert found.startswith(f"r.yaml:4: passes.0.{step.partition(':')[0]}: it makes {feature}, which checkpoint has no")


def test_integers_beside_rounded_inputs_have_8_bits_in_a_checkpoint(mistakes) -> None:
    scheme = (
        "{weights: {num_bits: 4, strategy: channel}, input_activations: {num_bits: 8, strategy: token, dynamic: true}}"
    )
    (found,) = mistakes(f"{HEAD}passes:\n  - round_to_nearest: {{scheme: {scheme}}}\nexport: [checkpoint]\n")
    assert "compressed-tensors stores integers beside rounded inputs as symmetric 8-bit numbers" in found


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        (
            "{weights: {num_bits: 4, strategy: block, block_structure: [16, 16]}}",
            "per tensor, per channel or per group",
        ),
        ("{weights: {num_bits: 4, strategy: tensor, symmetric: false}}", "zero points of channels and groups only"),
        (
            "{weights: {num_bits: 8, type: float, strategy: tensor}, "
            "input_activations: {num_bits: 8, strategy: token, dynamic: true}}",
            "round inputs to 8 bits as weights are",
        ),
    ],
)
def test_schemes_that_no_loader_of_a_checkpoint_takes_are_refused(scheme, why, mistakes) -> None:
    passes = f"passes:\n  - round_to_nearest: {{head: none, scheme: {scheme}}}\n"
    (found,) = mistakes(f"{HEAD}{passes}export: [checkpoint]\n")
    assert why in found
