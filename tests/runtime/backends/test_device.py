"""CUDA's calls in order, with the right arguments, and each failure named; of a runtime that only writes them down."""

import gc
import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from llmopt.optimizer.errors import MissingExtraError, ResourceError, UnsupportedError
from llmopt.runtime.backends.base import ExecutionError
from llmopt.runtime.backends.device import CudaDevice, open_device

SUCCESS, MEMORY, DRIVER = (
    SimpleNamespace(name=name) for name in ("cudaSuccess", "cudaErrorMemoryAllocation", "cudaErrorInsufficientDriver")
)


class Cudart:
    """The module cuda.bindings.runtime: ``answers`` has what functions give, ``calls`` what was called."""

    def __init__(self, **answers):
        self.calls = []
        self.__dict__ |= {
            "cudaStreamNonBlocking": 1,
            "cudaError_t": SimpleNamespace(cudaSuccess=SUCCESS),
            "cudaMemcpyKind": SimpleNamespace(
                cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down", cudaMemcpyDeviceToDevice="within"
            ),
            "cudaStreamCaptureMode": SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread"),
        }
        self.kept = np.ones(64, np.uint8)
        self.answers = {
            "cudaGetDeviceCount": (SUCCESS, 1),
            "cudaGetDeviceProperties": (SUCCESS, SimpleNamespace(major=8, minor=9, name=b"Paper GPU\0")),
            "cudaStreamCreateWithFlags": (SUCCESS, 7),
            "cudaMemGetInfo": (SUCCESS, 100, 200),
            "cudaMalloc": (SUCCESS, 4096),
            "cudaMallocHost": (SUCCESS, self.kept.ctypes.data),
            "cudaStreamEndCapture": (SUCCESS, "graph"),
            "cudaGraphInstantiate": (SUCCESS, "executable"),
            "cudaGetErrorString": (SUCCESS, b"some words"),
        } | answers

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            return self.answers.get(name, (SUCCESS,))

        return call


def device_of(**answers):
    cudart = Cudart(**answers)
    device = CudaDevice(cudart)
    cudart.calls.clear()
    return device, cudart


def test_the_gpu_is_known_by_name_and_architecture():
    device, _ = device_of()
    assert (device.name, device.architecture, device.stream, device.free_bytes()) == ("Paper GPU", "sm89", 7, 100)


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        (
            {"cudaGetDeviceCount": (DRIVER, None)},
            r"no GPU can be used here: cudaGetDeviceCount: cudaErrorInsufficientDriver \(some words\)",
        ),
        ({"cudaGetDeviceCount": (SUCCESS, 0)}, "GPU 0 cannot be used here: CUDA shows none"),
    ],
)
def test_no_gpu_is_said_with_the_drivers_own_words(answers, why):
    with pytest.raises(UnsupportedError, match=why):
        device_of(**answers)


def test_another_gpu_can_be_asked_for():
    cudart = Cudart(cudaGetDeviceCount=(SUCCESS, 2))
    CudaDevice(cudart, 1)
    assert ("cudaSetDevice", 1) in cudart.calls
    assert ("cudaGetDeviceProperties", 1) in cudart.calls
    with pytest.raises(UnsupportedError, match="GPU 2 cannot be used here: CUDA shows 2"):
        CudaDevice(cudart, 2)


def test_copies_are_queued_on_the_stream():
    device, cudart = device_of()
    array = np.zeros(3, np.int64)
    device.upload(1000, array)
    device.download(array, 2000)
    device.copy_rows(300, 400, rows=2, width=8, pitch=64)
    device.wait()
    assert cudart.calls == [
        ("cudaMemcpyAsync", 1000, array.ctypes.data, 24, "up", 7),
        ("cudaMemcpyAsync", array.ctypes.data, 2000, 24, "down", 7),
        ("cudaMemcpy2DAsync", 300, 64, 400, 64, 8, 2, "within", 7),
        ("cudaStreamSynchronize", 7),
    ]


def test_memory_is_zero_and_given_back_once():
    device, cudart = device_of()
    assert device.allocate(50) == 4096
    buffer = device.host_buffer((2, 4), np.int64)
    assert cudart.calls == [("cudaMalloc", 50), ("cudaMemsetAsync", 4096, 0, 50, 7), ("cudaMallocHost", 64)]
    assert buffer.ctypes.data == cudart.kept.ctypes.data
    assert not cudart.kept.any()
    cudart.calls.clear()
    device.close()
    device.close()
    assert cudart.calls == [("cudaFreeHost", cudart.kept.ctypes.data), ("cudaFree", 4096), ("cudaStreamDestroy", 7)]


def test_a_forgotten_device_gives_its_memory_back():
    device, cudart = device_of()
    device.allocate(50)
    cudart.calls.clear()
    del device
    gc.collect()
    assert [name for name, *_ in cudart.calls] == ["cudaFree", "cudaStreamDestroy"]


@pytest.mark.parametrize("kind", ["cudaMalloc", "cudaMallocHost"])
def test_memory_that_cannot_be_had_is_a_resource_error(kind):
    device, _ = device_of(**{kind: (MEMORY, 0)})
    with pytest.raises(ResourceError, match=rf"2\.00 GB of .* cannot be had: {kind}: cudaErrorMemoryAllocation"):
        device.allocate(2_000_000_000) if kind == "cudaMalloc" else device.host_buffer((250_000_000,), np.int64)


def test_any_other_failure_is_an_execution_error():
    device, _ = device_of(cudaStreamSynchronize=(DRIVER,))
    with pytest.raises(ExecutionError, match=r"cudaStreamSynchronize: cudaErrorInsufficientDriver \(some words\)"):
        device.wait()


def test_a_graph_is_captured_instantiated_and_replayed():
    device, cudart = device_of()
    graph = device.capture(lambda: device.upload(1000, np.zeros(1, np.int64)))
    device.replay(graph)
    assert [name for name, *_ in cudart.calls] == [
        "cudaStreamBeginCapture", "cudaMemcpyAsync", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphDestroy",
        "cudaGraphLaunch",
    ]  # fmt: skip
    assert cudart.calls[0] == ("cudaStreamBeginCapture", 7, "thread")
    assert cudart.calls[-1] == ("cudaGraphLaunch", "executable", 7)


def test_what_fails_while_it_is_captured_leaves_the_capture_and_is_the_error():
    device, cudart = device_of(cudaMemcpyAsync=(DRIVER,), cudaStreamEndCapture=(MEMORY, None))
    with pytest.raises(ExecutionError, match="cudaMemcpyAsync"):
        device.capture(lambda: device.upload(1000, np.zeros(1, np.int64)))
    assert cudart.calls[-1][0] == "cudaStreamEndCapture"


def test_a_missing_cuda_python_names_the_extra_that_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingExtraError, match="cuda-python is not installed") as caught:
        open_device("gpu")
    assert caught.value.hint == "pip install 'llmopt[gpu]'"


def _has_cuda_python() -> bool:
    return importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None


@pytest.mark.skipif(not _has_cuda_python(), reason="cuda-python is not installed")
def test_the_installed_cuda_python_has_all_that_is_called():
    from cuda.bindings import runtime

    for name in [
        *Cudart().answers,
        "cudaFree",
        "cudaFreeHost",
        "cudaMemcpyAsync",
        "cudaMemcpy2DAsync",
        "cudaMemsetAsync",
    ]:
        assert hasattr(runtime, name)
    for name in ("cudaStreamSynchronize", "cudaStreamBeginCapture", "cudaGraphDestroy", "cudaGraphLaunch"):
        assert hasattr(runtime, name)
    for name in ("cudaGraphExecDestroy", "cudaStreamDestroy", "cudaStreamNonBlocking"):
        assert hasattr(runtime, name)
    assert hasattr(runtime.cudaMemcpyKind, "cudaMemcpyDeviceToDevice")
    assert hasattr(runtime.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")
    status, _ = runtime.cudaGetDeviceCount()
    if status == runtime.cudaError_t.cudaSuccess:
        pytest.skip("this machine has a GPU")
    with pytest.raises(UnsupportedError, match=r"no GPU can be used here: cudaGetDeviceCount: cudaError\w+ \(.+\)"):
        open_device()
