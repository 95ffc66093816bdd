"""What is refused before a compiled engine runs, and that TensorRT's reason is said."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from llmopt.optimizer.errors import MissingExtraError, ResourceError, UnsupportedError
from llmopt.runtime.backends.base import ExecutionError
from llmopt.runtime.backends.tensorrt_program import DECODE, Program, compiled_for, open_program, tensorrt_package


@pytest.fixture
def program_of(paper_gpu):
    def make(**changes):
        engine, device = paper_gpu.compiled_engine(), paper_gpu.Device()
        loaded = paper_gpu.Engine(engine, device)
        for name, value in changes.items():
            setattr(loaded, name, value)
        log = SimpleNamespace(last=lambda: "a reason")
        return engine, Program(paper_gpu.tensorrt(), loaded, device, log=log, runtime=None)

    return make


def test_a_gpu_nothing_was_compiled_for_is_named_with_what_there_is(paper_gpu):
    device = SimpleNamespace(name="Paper GPU", architecture="sm75")
    with pytest.raises(UnsupportedError, match=r"Paper GPU \(sm75\); it has been compiled for sm120, sm89") as caught:
        compiled_for(paper_gpu.compiled_engine(), device)
    assert caught.value.hint == "add sm75 to the targets of tensorrt in the recipe and build again"


def test_the_engine_that_the_manifest_describes_is_accepted(program_of):
    engine, program = program_of()
    program.check(engine)


def test_an_engine_with_other_tensors_is_refused(program_of):
    engine, program = program_of()
    described = engine.model_copy(update={"outputs": engine.outputs[:-1]})
    with pytest.raises(UnsupportedError, match=r"disagree about present\.1\.value"):
        program.check(described)


def test_an_engine_without_a_decode_profile_is_refused(program_of):
    engine, program = program_of(num_optimization_profiles=1)
    with pytest.raises(UnsupportedError, match="no profile of its own for decoding"):
        program.check(engine)


def test_an_engine_that_copies_its_cache_is_refused(program_of):
    engine, program = program_of(get_aliased_input_tensor=lambda name: None)
    with pytest.raises(UnsupportedError, match=r"does not write present\.0\.key in place"):
        program.check(engine)


@pytest.mark.parametrize(
    "changes", [{"capacity": 256}, {"kv_heads": 1}, {"kv_dtype": "bfloat16"}, {"kv_dtype": "int8"}]
)
def test_caches_that_would_not_fit_the_pool_are_refused(program_of, changes):
    engine, program = program_of()
    with pytest.raises(UnsupportedError, match=r"disagree about past\.0\.key"):
        program.check(engine.model_copy(update=changes))


def test_a_context_that_cannot_be_made_says_why(program_of):
    _, program = program_of(create_execution_context=lambda config: None)
    with pytest.raises(ResourceError, match="cannot make a context: a reason"):
        program.context(DECODE)


def test_what_tensorrt_cannot_do_is_an_execution_error(program_of):
    _, program = program_of()
    program.must(True, "run")
    with pytest.raises(ExecutionError, match="TensorRT could not run: a reason"):
        program.must(False, "run")


def test_a_file_that_tensorrt_cannot_open_says_why(paper_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: paper_gpu.tensorrt())
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt/sm89.engine").write_bytes(b"of another version")
    with pytest.raises(UnsupportedError, match=r"tensorrt_rtx 1\.7\.1 cannot open .*: a version tag does not match"):
        open_program(tmp_path, paper_gpu.compiled_engine(), paper_gpu.Device())


@pytest.mark.parametrize(
    ("features", "package"), [([], "tensorrt-rtx"), (["tensorrt"], "tensorrt"), (["tensorrt_rtx"], "tensorrt-rtx")]
)
def test_a_missing_package_names_the_extra(features, package, monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=f"{package} is not installed") as caught:
        tensorrt_package(features)
    assert caught.value.hint == f"pip install 'llmopt[{package}]'"


def test_the_package_that_compiled_an_engine_opens_it(monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__name__=name))
    assert tensorrt_package(["tensorrt"]).__name__ == "tensorrt"
    assert tensorrt_package([]).__name__ == "tensorrt_rtx"


@pytest.mark.tensorrt
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_the_installed_package_has_all_that_is_called(paper_gpu, tmp_path):
    """Names only: no engine can be opened without a GPU, and that is said."""
    trt = tensorrt_package(["tensorrt_rtx"])
    for name in ("set_device_memory", "set_optimization_profile_async", "set_tensor_address", "set_input_shape"):
        assert hasattr(trt.IExecutionContext, name)
    assert hasattr(trt.IExecutionContext, "execute_async_v3")
    assert hasattr(trt.IExecutionContext, "is_stream_capturable")
    for name in ("get_tensor_shape", "get_tensor_dtype"):
        assert hasattr(trt.ICudaEngine, name)
    assert trt.DataType.HALF != trt.DataType.BF16
    for name in ("create_runtime_config", "device_memory_size_v2", "get_aliased_input_tensor", "get_tensor_name"):
        assert hasattr(trt.ICudaEngine, name)
    assert hasattr(trt.ICudaEngine, "num_io_tensors")
    assert hasattr(trt.ICudaEngine, "num_optimization_profiles")
    assert hasattr(trt.IRuntimeConfig, "set_execution_context_allocation_strategy")
    assert hasattr(trt.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy")
    assert hasattr(trt.DynamicShapesKernelSpecializationStrategy, "EAGER")
    assert hasattr(trt.ExecutionContextAllocationStrategy, "USER_MANAGED")
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt/sm89.engine").write_bytes(b"no engine")
    with pytest.raises(UnsupportedError, match=r"tensorrt_rtx 1\.\S+ cannot open .*Error"):
        open_program(tmp_path, paper_gpu.compiled_engine(), paper_gpu.Device())
