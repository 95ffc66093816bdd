"""`build` as a library: a directory that is whole, judged and reproducible, or no directory."""

import errno
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import onnx_ir
import pytest

from llmopt.optimizer import build as build_module
from llmopt.optimizer.build import build
from llmopt.optimizer.contracts import WeightPass
from llmopt.optimizer.errors import InputError, PassError, RejectedError, ResourceError, UnsupportedError
from llmopt.optimizer.gates import Gate
from llmopt.optimizer.manifest import Manifest
from llmopt.optimizer.progress import Silent
from llmopt.optimizer.recipe import NamedPass, Recipe
from llmopt.runtime.backends import onnxruntime

GATE = {"metric": "kl", "max": 10, "windows": 2, "tokens": 32}
IMPOSSIBLE = {"metric": "top1", "min": 1, "windows": 2, "tokens": 32}


@pytest.fixture
def make(recipe_of, tmp_path: Path):
    """Builds into a directory below ``tmp_path``; ``during`` is called by a pass that runs after the recipe's."""

    def make_(
        output: str = "out/it", *, during: Callable[[], object] | None = None, force: bool = False, **changes
    ) -> Manifest:
        recipe = Recipe.load(recipe_of(**changes))
        if during is not None:
            recipe = recipe.model_copy(update={"passes": (*recipe.passes, NamedPass("call", _calling(during)))})
        return build(recipe, tmp_path / output, cache=tmp_path / "cache", progress=Silent(), force=force)

    return make_


def _calling(function: Callable[[], object]) -> WeightPass:
    class Calling(WeightPass):
        def run(self, model, context):
            function()
            return model

    return Calling()


def contents(directory: Path) -> dict[str, str]:
    """sha256 of every file below, by relative name."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def fail(error: BaseException) -> Callable[..., None]:
    def failing(*_: object, **__: object) -> None:
        raise error

    return failing


def test_a_build_is_whole_and_stands_alone(make, tmp_path: Path, tiny_llama: Path) -> None:
    manifest = make()
    output = tmp_path / "out/it"
    assert [path.name for path in output.parent.iterdir()] == ["it"]
    assert Manifest.load(output, verify=True) == manifest
    found = contents(output)
    assert set(found) - set(manifest.files) == {"manifest.json", "build-record.json"}
    assert {"engine/model.onnx", "engine/model.onnx.data", "tokenizer.json", "chat_template.jinja"} <= set(found)
    assert (output / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()


def test_the_manifest_says_what_went_in_and_what_it_cost(make, tiny_llama: Path) -> None:
    manifest = make()
    assert manifest.source.spec == str(tiny_llama)
    assert "model.safetensors" in manifest.source.files
    assert manifest.recipe["passes"][0]["round_to_nearest"]["scheme"]["weights"]["num_bits"] == 8
    assert [record.name for record in manifest.passes] == ["round_to_nearest"]
    assert [layer.name for layer in manifest.layers[:2]] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
    ]
    assert {layer.scheme for layer in manifest.layers} == {"W8A8"}
    assert all(layer.error is not None and 0 < layer.error < 0.05 for layer in manifest.layers)
    assert {each.metric for each in manifest.measurements} == {"kl", "top1"}
    assert (manifest.verdict.status, [gate.passed for gate in manifest.verdict.gates]) == ("accepted", [True])


def test_times_and_host_are_kept_apart(make, tmp_path: Path) -> None:
    make()
    record = json.loads((tmp_path / "out/it/build-record.json").read_text())
    assert set(record["seconds"]) >= {"load_model", "passes", "export", "measure", "total"}
    peaks = record["peak_memory_bytes_by_step"]
    assert peaks.keys() == record["seconds"].keys() - {"total"}
    assert record["peak_memory_bytes"] >= max(peaks.values()) >= min(peaks.values()) > 1_000_000
    manifest = (tmp_path / "out/it/manifest.json").read_text()
    assert record["host"]["system"] not in manifest
    assert str(tmp_path / "out") not in manifest
    assert str(tmp_path / "cache") not in manifest


@pytest.mark.parametrize("passes", [[{"round_to_nearest": {"scheme": "W4A16", "group_size": 32}}], []])
def test_two_builds_of_one_recipe_are_equal_to_the_byte(
    recipe_of, tmp_path: Path, passes: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(recipe_of(passes=passes, verify="quick"))
    found = []
    for name in ("one", "another/place"):
        cache = tmp_path / "cache of" / name
        monkeypatch.setenv("LLMOPT_CACHE", str(cache))
        build(recipe, tmp_path / name, cache=cache, progress=Silent())
        found.append(contents(tmp_path / name))
    for each in found:
        del each["build-record.json"]
    assert found[0] == found[1]
    assert "manifest.json" in found[0]


def test_a_second_build_takes_its_passes_from_the_cache(make, tmp_path: Path) -> None:
    calls: list[int] = []
    make("one", during=lambda: calls.append(1))
    make("two", during=lambda: calls.append(2))
    assert calls == [1]
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()


def test_a_recipe_without_gates_is_measured_in_windows_the_engine_can_hold(make) -> None:
    manifest = make(accept=[], export=[{"onnx": {"capacity": 20}}])
    assert manifest.verdict.status == "unjudged"
    assert {each.metric for each in manifest.measurements} == {"kl", "top1"}
    assert {each.tokens for each in manifest.measurements} == {Gate(metric="kl", max=0).windows * 20}


def test_a_rejected_build_exists_and_says_so(make, tmp_path: Path) -> None:
    from llmopt.runtime.build import open_build

    passes = [{"round_to_nearest": {"scheme": "W4A16", "group_size": 64}}]
    manifest = make(passes=passes, accept=[GATE, IMPOSSIBLE])
    assert manifest.verdict.status == "rejected"
    assert [gate.passed for gate in manifest.verdict.gates] == [True, False]
    assert Manifest.load(tmp_path / "out/it").verdict == manifest.verdict
    with pytest.raises(RejectedError, match="top1 is 0"):
        open_build(tmp_path / "out/it")
    assert open_build(tmp_path / "out/it", slots=1, context=32, threads=1, force=True).manifest == manifest


def test_an_existing_build_is_only_replaced_by_force(make, tmp_path: Path) -> None:
    make()
    before = contents(tmp_path / "out/it")
    with pytest.raises(InputError, match="out/it exists") as caught:
        make(passes=[])
    assert "--force" in caught.value.hint
    assert contents(tmp_path / "out/it") == before
    assert {layer.scheme for layer in make(passes=[], force=True).layers} == {"float32"}
    assert Manifest.load(tmp_path / "out/it", verify=True).passes == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["it"]


@pytest.mark.parametrize("files", [[], ["thesis.txt"], ["manifest.json", "icon.svg"], ["build-record.json"]])
@pytest.mark.parametrize("force", [False, True])
def test_a_directory_that_is_no_build_is_never_replaced(make, tmp_path: Path, files: list[str], force: bool) -> None:
    (tmp_path / "out/it").mkdir(parents=True)
    for name in files:
        (tmp_path / "out/it" / name).write_text("{}")
    with pytest.raises(InputError, match="out/it exists and is no build of llmopt"):
        make(force=force)
    assert sorted(path.name for path in (tmp_path / "out/it").iterdir()) == sorted(files)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["it"]


def test_a_file_is_never_replaced(make, tmp_path: Path) -> None:
    (tmp_path / "it").write_text("mine")
    with pytest.raises(InputError, match="exists and is no build"):
        make("it", force=True)
    assert (tmp_path / "it").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), PassError("no"), OSError(errno.ENOSPC, "No space left")])
def test_a_forced_build_that_fails_leaves_the_old_one(make, tmp_path: Path, error: BaseException) -> None:
    make()
    before = contents(tmp_path / "out/it")
    with pytest.raises(type(error)):
        make(during=fail(error), force=True)
    assert contents(tmp_path / "out/it") == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["it"]


def test_a_damaged_build_can_be_replaced(make, tmp_path: Path) -> None:
    make()
    (tmp_path / "out/it/manifest.json").write_text("{")
    make(force=True)
    assert Manifest.load(tmp_path / "out/it", verify=True)


def test_two_builds_of_one_output_do_not_run_at_the_same_time(make, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out")
    refused = []

    def second() -> None:
        for name in ("out/it", "out/../out/it", "link/it"):
            with pytest.raises(InputError, match="another build is writing"):
                make(name)
            refused.append(name)

    make(during=second)
    assert len(refused) == 3
    assert Manifest.load(tmp_path / "out/it", verify=True)


def test_builds_of_different_outputs_do_run_at_the_same_time(make, tmp_path: Path) -> None:
    make("out/one", during=lambda: make("out/two", passes=[]))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one", "two"]


def test_a_build_that_appeared_while_this_one_started_is_not_replaced(
    make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = build_module.locked

    def slowly(path: Path, *, wait: bool = True):
        (tmp_path / "out/it").mkdir(parents=True)
        return locked(path, wait=wait)

    monkeypatch.setattr(build_module, "locked", slowly)
    with pytest.raises(InputError, match="out/it exists"):
        make()


def test_an_output_that_is_a_link_is_built_where_it_points(make, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    make("link")
    assert (tmp_path / "link").is_symlink()
    assert Manifest.load(tmp_path / "elsewhere", verify=True)
    make("link", passes=[], force=True)
    assert (tmp_path / "link").is_symlink()
    assert Manifest.load(tmp_path / "elsewhere", verify=True).passes == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_during_the_export_leaves_no_build(
    make, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = onnx_ir.save

    def full(graph: onnx_ir.Model, path: Path, **options: object) -> None:
        save(graph, path, **options)
        raise OSError(number, "full", str(path))

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(OSError, match="full"):
        make()
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    make()


def test_a_disk_that_is_too_full_is_found_before_any_work(
    make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def nearly_full(path: Path) -> object:
        asked.append(path)
        return SimpleNamespace(free=1000)

    monkeypatch.setattr(build_module.shutil, "disk_usage", nearly_full)
    calls: list[int] = []
    with pytest.raises(ResourceError, match=r"the build needs about 0\.0 GB, the disk of .* has 0\.0 GB free"):
        make("a/b/c", during=lambda: calls.append(1))
    assert calls == []
    assert asked == [tmp_path / "a/b"]
    assert not (tmp_path / "a").exists()


def test_a_text_that_is_too_short_is_found_before_any_pass(make, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    calls: list[int] = []
    with pytest.raises(InputError, match="2 windows of 32 need 64"):
        make(accept=[{**GATE, "data": "short.txt"}], during=lambda: calls.append(1))
    assert calls == []


def test_experts_stay_out_of_a_scheme_that_quantizes_activations(make, family_of) -> None:
    manifest = make(model=str(family_of("qwen3_moe")), verify="quick")
    schemes = {layer.name: layer.scheme for layer in manifest.layers}
    assert {scheme for name, scheme in schemes.items() if ".experts." in name} == {"W8A16"}
    assert {scheme for name, scheme in schemes.items() if ".experts." not in name} == {"W8A8"}
    assert not any(name.endswith("mlp.gate") for name in schemes)
    (record,) = (each for each in manifest.graph_passes["engine/model.onnx"] if each.name == "lower_experts")
    assert (record.details["applied"], record.fallbacks) == (2, [])


def test_an_override_that_gives_experts_such_a_scheme_is_refused_before_any_pass(make, family_of) -> None:
    overrides = [{"match": "re:.*q_proj", "scheme": "none"}, {"match": "re:.*mlp", "scheme": "W8A8"}]
    passes = [{"round_to_nearest": {"scheme": "W8A16", "overrides": overrides}}]
    with pytest.raises(UnsupportedError) as caught:
        make(model=str(family_of("qwen3_moe")), passes=passes, during=fail(AssertionError("a pass has run")))
    assert caught.value.message == (
        "passes.0.round_to_nearest.overrides.1.scheme: model.layers.0.mlp.experts.0.gate_proj is an expert: "
        "the cpu target has no kernel for experts that quantizes activations; W8A16 and W4A16 leave them"
    )
    assert "the option experts" in caught.value.hint


def test_running_out_of_the_memory_allowed_names_the_limit(make, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"more memory than resources\.max_ram_gb: 64") as caught:
        make(during=fail(MemoryError()), resources={"threads": 1, "max_ram_gb": 64})
    assert isinstance(caught.value.__cause__, MemoryError)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scheme", "limit", "packed"), [("W8A8", 11.0, True), ("W8A8", 10.5, False), ("W8A16", 10.5, True)]
)
def test_weights_are_measured_unpacked_where_two_copies_exceed_the_limit_and_the_numbers_stay(
    make, monkeypatch, scheme: str, limit: float, packed: bool
) -> None:
    # The limit is that of the whole process, and that of the tests may be large by now.
    monkeypatch.setattr("llmopt.optimizer.build._MEASURING_BYTES", 10 << 30)
    asked = []
    true = onnxruntime.open_backend
    monkeypatch.setattr(onnxruntime, "open_backend", lambda *a, **o: asked.append(o["packed"]) or true(*a, **o))
    passes = [{"round_to_nearest": {"scheme": scheme}}]
    whole = make("out/whole", passes=passes)
    limited = make("out/limited", passes=passes, resources={"max_ram_gb": limit})
    assert asked == [True, packed]
    assert limited.measurements == whole.measurements


def test_the_memory_limit_ends_with_the_build(make) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    seen = []
    make(
        during=lambda: seen.append(resource.getrlimit(resource.RLIMIT_DATA)[0]),
        resources={"threads": 1, "max_ram_gb": 64},
    )
    assert seen == [64 * 10**9]
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_checkpoint_alone_is_measured_and_judged(make, tmp_path: Path) -> None:
    step = {"round_to_nearest": {"scheme": "W4A16", "group_size": 32}}
    manifest = make(passes=[step], export=[{"checkpoint": {"dtype": "float16"}}])
    (checkpoint,) = manifest.checkpoints
    assert manifest.engines == []
    assert manifest.verdict.status == "accepted"
    assert [each.metric for each in manifest.measurements] == ["kl", "top1"]
    assert (checkpoint.path, checkpoint.format, checkpoint.dtype) == ("checkpoint", "compressed-tensors", "float16")
    assert {
        "checkpoint/model.safetensors",
        "checkpoint/config.json",
        "checkpoint/tokenizer.json",
    } <= manifest.files.keys()
    config = json.loads((tmp_path / "out/it/checkpoint/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "compressed-tensors" in (tmp_path / "out/it/report.html").read_text()


def test_a_checkpoint_is_judged_as_it_was_written(make) -> None:
    manifest = make(passes=[], export=[{"checkpoint": {"format": "safetensors", "dtype": "bfloat16"}}])
    (kl, *_) = (each.value for each in manifest.measurements if each.metric == "kl")
    assert 0 < kl < 0.01  # floats were rounded to bfloat16, and nothing else happened


def test_an_engine_and_a_checkpoint_come_from_one_build(make) -> None:
    manifest = make(export=[{"onnx": {"target": "cpu"}}, {"checkpoint": {}}])
    assert len(manifest.engines) == len(manifest.checkpoints) == 1


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        ("qwen3_moe", {"scheme": "W4A16", "group_size": 16}, "is an expert: transformers keeps experts in one tensor"),
        ("llama", {"scheme": "FP8_BLOCK"}, "takes whole blocks of 128x128 only, and this weight is 64x64"),
    ],
)
def test_what_a_loader_could_not_take_is_refused_before_any_pass(model, options, why, make, family_of) -> None:
    passes = [{"round_to_nearest": options}]
    with pytest.raises(UnsupportedError, match=why):
        make(model=str(family_of(model)), passes=passes, export=[{"checkpoint": {}}], during=fail(AssertionError()))
