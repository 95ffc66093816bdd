"""Which engine of a build is executed, and by what."""

import onnxruntime as ort
import pytest

from llmopt.optimizer.errors import InputError, MissingExtraError, ResourceError, UnsupportedError
from llmopt.optimizer.manifest import Manifest, SourceEntry, Verdict
from llmopt.runtime.backends import device, tensorrt, tensorrt_encoder, tensorrt_program
from llmopt.runtime.backends.opening import (
    Executor,
    free_memory,
    open_backend,
    open_encoder_backend,
    pick_encoder,
    pick_engine,
    slot_capacity,
)
from llmopt.runtime.backends.toy import toy_engine
from llmopt.runtime.sizing import choose_sizes, item_bytes, pool_bytes

CPU = toy_engine().model_copy(update={"exporter": "onnx", "target": "cpu", "path": "engine/model.onnx"})
CUDA = CPU.model_copy(update={"target": "cuda", "path": "cuda/model.onnx"})


@pytest.fixture
def compiled(paper_gpu):
    return paper_gpu.compiled_engine()


@pytest.fixture
def machine(monkeypatch, paper_gpu):
    """Makes this machine one with these providers of ONNX Runtime, and this GPU."""

    def make(*providers, gpu=None):
        monkeypatch.setattr(ort, "get_available_providers", lambda: [*providers, "CPUExecutionProvider"])

        def open_device(extra="tensorrt-rtx", *, index=0):
            if gpu is None:
                raise MissingExtraError("cuda-python", extra)
            return gpu

        monkeypatch.setattr(device, "open_device", open_device)
        monkeypatch.setattr(tensorrt, "open_device", open_device)
        monkeypatch.setattr(tensorrt_encoder, "open_device", open_device)
        monkeypatch.setattr(tensorrt_program, "tensorrt_package", lambda features: paper_gpu.tensorrt())

    make()
    return make


def manifest(*engines):
    return Manifest(
        llmopt="0", versions={}, source=SourceEntry(spec="x", digest="0" * 64, files={}), recipe={},
        architecture="llama", layers=[], passes=[], engines=list(engines), verdict=Verdict(status="unjudged"),
    )  # fmt: skip


def picked(tmp_path, *engines, **wanted):
    return pick_engine(tmp_path, manifest(*engines), Executor(**wanted))


def test_the_fastest_that_runs_here_is_taken(tmp_path, machine, paper_gpu, compiled):
    everything = CPU, CUDA, compiled
    assert picked(tmp_path, *everything) is CPU
    machine("CUDAExecutionProvider")
    assert picked(tmp_path, *everything) is CUDA
    machine("CUDAExecutionProvider", gpu=paper_gpu.Device())
    assert picked(tmp_path, *everything) is compiled


def test_a_gpu_that_nothing_was_compiled_for_gets_the_next_best(tmp_path, machine, paper_gpu, compiled):
    gpu = paper_gpu.Device()
    gpu.architecture = "sm75"
    machine(gpu=gpu)
    assert picked(tmp_path, CPU, compiled) is CPU
    assert gpu.calls == ["close"]


def test_where_nothing_runs_opening_says_what_is_missing(tmp_path, machine, compiled):
    assert picked(tmp_path, compiled) is compiled
    with pytest.raises(MissingExtraError, match="cuda-python"):
        open_backend(tmp_path, compiled, slots=1, capacity=128, threads=1)
    assert picked(tmp_path, CUDA) is CUDA
    with pytest.raises(UnsupportedError, match="has no CUDAExecutionProvider"):
        open_backend(tmp_path, CUDA, slots=1, capacity=128, threads=1)


@pytest.mark.parametrize(
    ("wanted", "target"),
    [
        ({"engine": "onnx"}, "cpu"),
        ({"engine": "tensorrt"}, "tensorrt"),
        ({"provider": "cpu"}, "cpu"),
        ({"provider": "cuda"}, "cuda"),
        ({"provider": "nv_tensorrt_rtx"}, "tensorrt"),
        ({"engine": "tensorrt", "provider": None, "cuda_graphs": False}, "tensorrt"),
    ],
)
def test_what_somebody_asks_for_is_taken(tmp_path, machine, compiled, wanted, target):
    assert picked(tmp_path, compiled, CUDA, CPU, **wanted).target == target


def test_the_cpu_executes_the_graphs_of_others_when_it_is_asked_to(tmp_path, machine, compiled):
    """That is how engines for GPUs are measured without one."""
    assert picked(tmp_path, compiled, CUDA, provider="cpu") is CUDA
    assert Executor(provider="cpu").provider_of(CUDA).device == "cpu"
    assert not Executor(provider="cpu").uses_tensorrt(compiled)


@pytest.mark.parametrize(
    ("wanted", "who", "export"),
    [
        ({"provider": "cuda"}, "ONNX Runtime's CUDAExecutionProvider", "{onnx: {target: cuda}}"),
        ({"provider": "nv_tensorrt_rtx"}, "ONNX Runtime's NvTensorRTRTXExecutionProvider", "tensorrt"),
        ({"engine": "tensorrt"}, "TensorRT", "tensorrt"),
    ],
)
def test_a_build_without_such_an_engine_says_how_to_get_one(tmp_path, machine, wanted, who, export):
    with pytest.raises(InputError, match=rf"has no engine that {who} executes \(engines: onnx for cpu\)") as caught:
        picked(tmp_path, CPU, **wanted)
    assert caught.value.hint == f"add 'export: [{export}]' to the recipe and build again"


def test_an_engine_of_an_unknown_kind_is_none(tmp_path, machine):
    with pytest.raises(InputError, match=r"no engine that this llmopt executes \(engines: toy for toy\)"):
        picked(tmp_path, toy_engine())


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({"provider_options": {"device_id": "0"}}, "no provider that has any"),
        ({"provider": "cpu", "provider_options": {"device_id": "0"}}, "no provider that has any"),
        ({"engine": "tensorrt", "provider": "cuda"}, "a provider is a part of ONNX Runtime"),
    ],
)
def test_contradictions_are_refused(wanted, why):
    with pytest.raises(InputError, match=why):
        Executor(**wanted)


@pytest.mark.parametrize("wanted", [{"provider": "cpu"}, {"provider": "cuda"}, {"cuda_graphs": False}])
def test_an_encoder_has_the_choice_of_its_engine_only(wanted):
    Executor(engine="tensorrt").check_encoder()
    with pytest.raises(InputError, match="runs in ONNX Runtime on the CPU, or in TensorRT without CUDA graphs"):
        Executor(**wanted).check_encoder()


def test_of_encoders_the_one_for_the_gpu_is_taken_where_there_is_one(tmp_path, machine, paper_gpu):
    on_gpu = paper_gpu.compiled_encoder()
    on_cpu = on_gpu.model_copy(update={"exporter": "onnx", "target": "cpu"})
    build = manifest().model_copy(update={"encoders": [on_cpu, on_gpu]})
    assert pick_encoder(tmp_path, build, Executor()) is on_cpu
    assert pick_encoder(tmp_path, build, Executor(engine="tensorrt")) is on_gpu
    machine(gpu=paper_gpu.Device())
    assert pick_encoder(tmp_path, build, Executor()) is on_gpu
    assert pick_encoder(tmp_path, build, Executor(engine="onnx")) is on_cpu


def test_an_encoder_that_was_not_built_for_what_is_wanted_says_how_to_get_one(tmp_path, machine, paper_gpu):
    on_cpu = paper_gpu.compiled_encoder().model_copy(update={"exporter": "onnx", "target": "cpu"})
    build = manifest().model_copy(update={"encoders": [on_cpu]})
    with pytest.raises(InputError, match=r"no engine that TensorRT executes \(engines: onnx\)") as caught:
        pick_encoder(tmp_path, build, Executor(engine="tensorrt"))
    assert caught.value.hint == "add 'export: [tensorrt]' to the recipe and build again"
    with pytest.raises(InputError, match="is no build of an encoder"):
        pick_encoder(tmp_path, manifest(CPU), Executor())


def test_a_compiled_encoder_without_a_gpu_says_what_is_missing(tmp_path, machine, paper_gpu):
    with pytest.raises(MissingExtraError, match="cuda-python"):
        open_encoder_backend(tmp_path, paper_gpu.compiled_encoder(), threads=1)


def test_a_compiled_engine_has_one_size_of_slots(compiled):
    assert slot_capacity(compiled, 20) == slot_capacity(compiled, 2000) == 128
    assert slot_capacity(CPU, 20) == 20
    assert slot_capacity(CPU, 2000) == 128


def test_the_memory_that_is_free_is_the_gpus_without_the_engine(tmp_path, machine, paper_gpu, compiled):
    machine("CUDAExecutionProvider", gpu=paper_gpu.Device(memory=1_000_000))
    for name, size in (("tensorrt/sm89.engine", 1000), ("tensorrt/model.onnx", 5), ("cuda/model.onnx", 300)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    logits = 4 * 64 * 16
    assert free_memory(tmp_path, CPU, Executor()) is None
    assert free_memory(tmp_path, CUDA, Executor(provider="cpu")) is None
    assert free_memory(tmp_path, CUDA, Executor()) == 1_000_000 - 300 - logits
    assert free_memory(tmp_path, compiled, Executor()) == 1_000_000 - 1000 - logits


def test_an_onnxruntime_without_the_provider_is_named_before_the_gpu_is_asked(tmp_path, machine):
    with pytest.raises(UnsupportedError, match="has no CUDAExecutionProvider"):
        free_memory(tmp_path, CUDA, Executor())


def test_sizes_keep_to_what_the_engine_was_compiled_for(compiled):
    slot = pool_bytes(compiled, 1, 128)
    found = choose_sizes(compiled, capacity=128, running=None, free=100 * slot)
    assert (found.running, found.slots) == (8, 16)
    found = choose_sizes(compiled, capacity=128, running=None, free=6 * slot)
    assert (found.running, found.slots) == (3, 3)
    with pytest.raises(InputError, match="9 requests at once were asked for, and the engine was compiled for 8"):
        choose_sizes(compiled, capacity=128, running=9, free=100 * slot)
    with pytest.raises(ResourceError) as caught:
        choose_sizes(compiled, capacity=128, running=5, free=8 * slot)
    assert caught.value.hint == "what fits: 4 slots"  # and no shorter context


def test_bfloat16_has_two_bytes():
    assert (item_bytes("bfloat16"), item_bytes("float16"), item_bytes("int8")) == (2, 2, 1)


def test_each_engine_is_opened_by_what_executes_it(tmp_path, machine, paper_gpu, compiled, monkeypatch):
    asked = []
    monkeypatch.setattr(tensorrt, "open_backend", lambda *a, **options: asked.append(("tensorrt", options)))
    monkeypatch.setattr(
        "llmopt.runtime.backends.onnxruntime.open_backend", lambda *a, **options: asked.append(("onnx", options))
    )
    sizes = {"slots": 2, "capacity": 128, "threads": 1}
    open_backend(tmp_path, compiled, Executor(cuda_graphs=False), **sizes)
    open_backend(tmp_path, compiled, Executor(provider="nv_tensorrt_rtx", provider_options={"a": "b"}), **sizes)
    open_backend(tmp_path, CUDA, **sizes)
    open_backend(tmp_path, CPU, **sizes)
    assert asked[0] == ("tensorrt", {"slots": 2, "capacity": 128, "cuda_graphs": False})
    found = [(kind, options["provider"].name, dict(options["provider"].options)) for kind, options in asked[1:]]
    assert found == [("onnx", "nv_tensorrt_rtx", {"a": "b"}), ("onnx", "cuda", {}), ("onnx", "cpu", {})]


def test_a_whole_build_is_opened_on_the_gpu(tmp_path, machine, paper_gpu, compiled, byte_tokenizer, monkeypatch):
    """Sizes from the GPU's memory, the engine's own capacity, and what was compiled for it."""
    import shutil

    from llmopt.runtime.build import open_build

    engine = compiled.model_copy(update={"vocab_size": 258})
    shutil.copytree(byte_tokenizer, tmp_path / "build")
    manifest(CPU, engine).save(tmp_path / "build")
    (tmp_path / "build/tensorrt").mkdir()
    (tmp_path / "build/tensorrt/sm89.engine").write_bytes(b"compiled")
    gpu, package = paper_gpu.Device(), paper_gpu.tensorrt()
    package.loads = paper_gpu.Engine(engine, gpu)
    machine(gpu=gpu)
    monkeypatch.setattr(tensorrt_program, "tensorrt_package", lambda features: package)
    build = open_build(tmp_path / "build")
    assert build.backend.engine == engine
    assert (build.sizes.running, build.sizes.capacity, build.backend.slots) == (8, 128, 16)
    with pytest.raises(InputError, match="a context of 64 tokens was asked for, and the engine was compiled for 128"):
        open_build(tmp_path / "build", context=64)
