"""Where the keys and values of all sequences lie: slots one behind the other, in the host's memory or in a GPU's.

The pool on a GPU was never executed on one; tests run it in the host's memory, by the same calls.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmopt.optimizer.errors import ResourceError
from llmopt.runtime.backends.session import Provider, open_session, ort_errors

__all__ = ["GpuPool", "HostPool", "SlotPool", "aligned_zeros"]


class SlotPool(Protocol):
    """Per KV tensor ``[slots, kv_heads, capacity, head_dim]``, all of one dtype.

    Attributes:
        device: Where, in ONNX Runtime's words.
        device_id: Which of them.
    """

    device: str
    device_id: int

    def address(self, tensor: int, slot: int) -> int:
        """Where a slot of a tensor begins."""

    def copy(self, source: int, destination: int, length: int) -> None:
        """Copy at least the first ``length`` tokens of one slot over those of another."""


class HostPool:
    """Arrays of numpy. The pages of a large one are claimed only when they are written.

    Args:
        tensors: How many.
        shape: Of each, ``(slots, kv_heads, capacity, head_dim)``.
        item: Bytes of an element. It is only moved here, so its type does not matter.
    """

    device = "cpu"
    device_id = 0

    def __init__(self, tensors: int, shape: tuple[int, int, int, int], item: int) -> None:
        self._arrays = [aligned_zeros(shape, np.dtype(f"u{item}")) for _ in range(tensors)]

    def address(self, tensor: int, slot: int) -> int:
        """See ``SlotPool.address``."""
        array = self._arrays[tensor]
        return array.ctypes.data + slot * array.strides[0]

    def copy(self, source: int, destination: int, length: int) -> None:
        """See ``SlotPool.copy``."""
        for array in self._arrays:
            array[destination, :, :length] = array[source, :, :length]


class GpuPool:
    """Memory that ONNX Runtime allocates.

    Its Python interface has no copy between two places on a GPU. Slots are copied by a graph of Identity nodes, bound
    by address: a whole slot of every tensor in one run, since the tokens of a prefix are not contiguous in it.

    Args:
        tensors: How many.
        slots: Of each.
        slot_bytes: Of each slot, an even number.
        provider: Whose memory it is, and what copies in it.
        device: Where it is; tests say cpu.
    """

    def __init__(
        self, tensors: int, slots: int, slot_bytes: int, provider: Provider, *, device: str | None = None
    ) -> None:
        import onnxruntime as ort

        self.device = device or provider.device
        self.device_id = provider.device_id
        self._slot_bytes = slot_bytes
        size = slots * slot_bytes
        where = (self.device, self.device_id)
        try:
            # What lies behind a sequence is masked, but not in every kernel if it is no number.
            self._values = [ort.OrtValue.ortvalue_from_numpy(np.zeros(size, np.uint8), *where) for _ in range(tensors)]
        except ort_errors() as error:
            raise ResourceError(
                f"{tensors * size / 1e9:.2f} GB of keys and values cannot be had on the GPU: {error}",
                hint="fewer --slots and --prefix-slots, or a shorter --context",
            ) from error
        self._addresses = [value.data_ptr() for value in self._values]
        self._copier = open_session(_copy_graph(tensors, slot_bytes // 2), 1, provider=provider)

    def address(self, tensor: int, slot: int) -> int:
        """See ``SlotPool.address``."""
        return int(self._addresses[tensor]) + slot * self._slot_bytes

    def copy(self, source: int, destination: int, length: int) -> None:
        """See ``SlotPool.copy``: all of the slot."""
        del length
        binding = self._copier.io_binding()
        shape = (self._slot_bytes // 2,)
        for tensor in range(len(self._values)):
            where = (self.device, self.device_id, np.float16, shape)
            binding.bind_input(f"from.{tensor}", *where, self.address(tensor, source))
            binding.bind_output(f"to.{tensor}", *where, self.address(tensor, destination))
        self._copier.run_with_iobinding(binding)


def aligned_zeros(shape: Sequence[int], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Zeros that start on a cache line. The pages of a large array are claimed only when written."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : first + size].view(dtype).reshape(tuple(shape))


def _copy_graph(tensors: int, elements: int) -> bytes:
    """A graph that copies ``tensors`` vectors. They are called float16, which every GPU's provider moves."""
    from onnx import TensorProto, helper

    def values(name: str) -> list[Any]:
        made = helper.make_tensor_value_info
        return [made(f"{name}.{tensor}", TensorProto.FLOAT16, [elements]) for tensor in range(tensors)]

    nodes = [helper.make_node("Identity", [f"from.{tensor}"], [f"to.{tensor}"]) for tensor in range(tensors)]
    graph = helper.make_graph(nodes, "copy", values("from"), values("to"))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    data: bytes = model.SerializeToString()
    return data
