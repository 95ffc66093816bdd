"""A GPU's memory and the one stream of work on it: what the TensorRT backend asks of CUDA, and nothing else.

Never executed on hardware: no machine of this project has a GPU. The names and results of the calls are those of the
installed cuda-python; what they do to memory was only seen in a fake of this surface (tests/runtime/backends).
"""

import ctypes
import importlib
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from llmopt.optimizer.errors import MissingExtraError, ResourceError, UnsupportedError
from llmopt.runtime.backends.base import ExecutionError

__all__ = ["CudaDevice", "Device", "open_device"]

Scalar = TypeVar("Scalar", bound=np.generic)


class Device(Protocol):
    """One GPU. Copies and runs are queued in the order of the calls; ``wait`` ends when all are done.

    Pointers are addresses in the GPU's memory, as integers; sizes are bytes. Calls come from one thread at a time.
    Everything raises ExecutionError when the driver reports a failure, and names it.

    Attributes:
        name: What the vendor calls it.
        architecture: Its compute capability, as ``sm89``.
        stream: What libraries queue their own work on.
    """

    name: str
    architecture: str
    stream: int

    def free_bytes(self) -> int:
        """How much of its memory nobody has."""

    def allocate(self, size: int) -> int:
        """Zeros on the GPU, aligned to 256 bytes, until the device is closed.

        Raises:
            ResourceError: There is not so much.
        """

    def host_buffer(self, shape: tuple[int, ...], dtype: type[Scalar]) -> npt.NDArray[Scalar]:
        """Zeros in memory of the host that is never moved, so that queued copies may read and write it.

        Raises:
            ResourceError: There is not so much.
        """

    def upload(self, pointer: int, source: npt.NDArray[Any]) -> None:
        """Queue a copy to the GPU; ``source`` is contiguous and keeps its contents until ``wait``."""

    def download(self, destination: npt.NDArray[Any], pointer: int) -> None:
        """Queue a copy from the GPU; ``destination`` is contiguous, and written when ``wait`` ends."""

    def copy_rows(self, destination: int, source: int, *, rows: int, width: int, pitch: int) -> None:
        """Queue a copy within the GPU: of ``rows`` pieces of ``width`` bytes that begin every ``pitch`` bytes."""

    def wait(self) -> None:
        """Until all that was queued is done."""

    def capture(self, work: Callable[[], None]) -> Any:
        """What ``work`` queues, as a graph that ``replay`` queues at once; nothing of it runs now."""

    def replay(self, graph: Any) -> None:
        """Queue what was captured, over the same memory."""


def open_device(extra: str = "tensorrt-rtx", *, index: int = 0) -> "CudaDevice":
    """One of the GPUs that CUDA shows this process; the environment's CUDA_VISIBLE_DEVICES chooses and orders them.

    Args:
        extra: Of llmopt, which brings cuda-python for what needs it here.
        index: Which. Calls from other threads than this one always go to the first.

    Raises:
        MissingExtraError: cuda-python is not installed.
        UnsupportedError: There is no GPU, or no driver for it.
    """
    try:
        cudart = importlib.import_module("cuda.bindings.runtime")
    except ModuleNotFoundError as error:
        raise MissingExtraError("cuda-python", extra) from error
    return CudaDevice(cudart, index)


class CudaDevice:
    """See ``Device``.

    Args:
        cudart: The module cuda.bindings.runtime. Each of its functions gives a status, and results behind it.
        index: Which of the GPUs it shows.

    Raises:
        UnsupportedError: There is no GPU, or no driver for it.
    """

    def __init__(self, cudart: Any, index: int = 0) -> None:
        self._cudart = cudart
        try:
            count = self._call("cudaGetDeviceCount")
        except ExecutionError as error:
            raise UnsupportedError(
                f"no GPU can be used here: {error}", hint="install the GPU's driver, or run where there is a GPU"
            ) from error
        if index >= count:
            raise UnsupportedError(
                f"GPU {index} cannot be used here: CUDA shows {count or 'none'}", hint="see CUDA_VISIBLE_DEVICES"
            )
        self._call("cudaSetDevice", index)
        properties = self._call("cudaGetDeviceProperties", index)
        self.name: str = properties.name.decode(errors="replace").rstrip("\0")
        self.architecture = f"sm{properties.major}{properties.minor}"
        self._stream = self._call("cudaStreamCreateWithFlags", cudart.cudaStreamNonBlocking)
        self.stream = int(self._stream)
        self._owned: list[tuple[str, Any]] = [("cudaStreamDestroy", self._stream)]
        self._release = weakref.finalize(self, _release, cudart, self._owned)

    def close(self) -> None:
        """Give back all memory and graphs; the device is of no use any more."""
        self._release()

    def free_bytes(self) -> int:
        """See ``Device.free_bytes``."""
        free, _ = self._call("cudaMemGetInfo")
        return int(free)

    def allocate(self, size: int) -> int:
        """See ``Device.allocate``."""
        pointer = int(self._own("cudaFree", "cudaMalloc", size))
        self._call("cudaMemsetAsync", pointer, 0, size, self._stream)
        return pointer

    def host_buffer(self, shape: tuple[int, ...], dtype: type[Scalar]) -> npt.NDArray[Scalar]:
        """See ``Device.host_buffer``."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = int(self._own("cudaFreeHost", "cudaMallocHost", size))
        array = np.frombuffer(memoryview((ctypes.c_uint8 * size).from_address(address)), dtype).reshape(shape)
        array[...] = 0
        return array

    def upload(self, pointer: int, source: npt.NDArray[Any]) -> None:
        """See ``Device.upload``."""
        self._copy(pointer, source.ctypes.data, source.nbytes, "cudaMemcpyHostToDevice")

    def download(self, destination: npt.NDArray[Any], pointer: int) -> None:
        """See ``Device.download``."""
        self._copy(destination.ctypes.data, pointer, destination.nbytes, "cudaMemcpyDeviceToHost")

    def copy_rows(self, destination: int, source: int, *, rows: int, width: int, pitch: int) -> None:
        """See ``Device.copy_rows``."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", destination, pitch, source, pitch, width, rows, kind, self._stream)

    def wait(self) -> None:
        """See ``Device.wait``."""
        self._call("cudaStreamSynchronize", self._stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """See ``Device.capture``."""
        # Other threads of the process may call CUDA meanwhile.
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            # What failed is the error; the stream only has to leave the capture.
            self._cudart.cudaStreamEndCapture(self._stream)
            raise
        graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            return self._own("cudaGraphExecDestroy", "cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def replay(self, graph: Any) -> None:
        """See ``Device.replay``."""
        self._call("cudaGraphLaunch", graph, self._stream)

    def _copy(self, destination: int, source: int, size: int, kind: str) -> None:
        self._call(
            "cudaMemcpyAsync", destination, source, size, getattr(self._cudart.cudaMemcpyKind, kind), self._stream
        )

    def _own(self, destroy: str, create: str, *arguments: Any) -> Any:
        """What ``create`` made; ``destroy`` is called when the device is closed."""
        made = self._call(create, *arguments)
        self._owned.append((destroy, made))
        return made

    def _call(self, name: str, *arguments: Any) -> Any:
        """One function of CUDA: its result, or its results where there are several."""
        status, *results = getattr(self._cudart, name)(*arguments)
        if status != self._cudart.cudaError_t.cudaSuccess:
            raise self._failure(name, arguments, status)
        return results[0] if len(results) == 1 else results

    def _failure(self, name: str, arguments: tuple[Any, ...], status: Any) -> Exception:
        words = self._cudart.cudaGetErrorString(status)[1].decode(errors="replace")
        said = f"{name}: {status.name} ({words})"
        if name in ("cudaMalloc", "cudaMallocHost"):
            what = "GPU" if name == "cudaMalloc" else "host's page-locked"
            return ResourceError(f"{arguments[0] / 1e9:.2f} GB of the {what} memory cannot be had: {said}")
        return ExecutionError(said)


def _release(cudart: Any, owned: list[tuple[str, Any]]) -> None:
    """Destroy what was made, the last first; what fails here cannot be helped, and the process' end frees it."""
    while owned:
        destroy, made = owned.pop()
        getattr(cudart, destroy)(made)
