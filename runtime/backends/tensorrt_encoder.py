"""Runs a TensorRT engine of an encoder: ids and mask of some texts to the GPU, a vector of each back.

Never executed on hardware: no machine of this project has a GPU. The fakes of tests/runtime/backends run it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llmopt.optimizer.manifest import EncoderEngine
from llmopt.runtime.backends.base import FloatArray, IntArray
from llmopt.runtime.backends.device import Device, open_device
from llmopt.runtime.backends.encoder import EncoderBackend
from llmopt.runtime.backends.tensorrt_program import TEXTS, Program, open_program

__all__ = ["TensorRTCalls", "open_encoder_backend"]


def open_encoder_backend(directory: Path, engine: EncoderEngine) -> EncoderBackend:
    """Load ``engine`` of the build in ``directory`` on this machine's GPU.

    Args:
        directory: The build.
        engine: One of its manifest's encoders.

    Raises:
        MissingExtraError: TensorRT or cuda-python is not installed.
        UnsupportedError: There is no GPU, or nothing was compiled for it.
        ResourceError: The engine does not fit in the GPU's memory.
    """
    device = open_device()
    calls = TensorRTCalls(open_program(directory, engine, device), engine, device)
    # One call at a time, as large as the engine takes: a GPU has more cores than a text has tokens.
    return EncoderBackend(lambda _: calls, engine, 1, call_tokens=calls.texts * engine.capacity)


class TensorRTCalls:
    """A loaded engine, and the buffers that its calls go through.

    Args:
        program: The loaded engine.
        engine: What the manifest says of it.
        device: Where it runs; used by this alone.
    """

    def __init__(self, program: Program, engine: EncoderEngine, device: Device) -> None:
        assert engine.slots is not None  # the exporter writes for how many texts it was compiled
        self.texts = engine.slots
        self._program = program
        self._device = device
        tokens, (output,) = self.texts * engine.capacity, engine.outputs
        self._host = {each.name: device.host_buffer((tokens,), np.int64) for each in engine.inputs}
        self._buffers = {name: device.allocate(array.nbytes) for name, array in self._host.items()}
        self._vectors = device.host_buffer((self.texts, engine.hidden_size), np.float32)
        self._buffers[output.name] = device.allocate(self._vectors.nbytes)
        self._output = output.name
        self._context = program.context(TEXTS)
        for name, pointer in self._buffers.items():
            program.must(self._context.set_tensor_address(name, pointer), f"bind {name}")

    def run(self, names: Sequence[str], feeds: Mapping[str, IntArray]) -> list[FloatArray]:
        """One call, with the arguments of a session of ONNX Runtime.

        Args:
            names: Of the outputs, of which there is one.
            feeds: By input int64 ``[n, t]``, of at most ``texts`` rows.

        Returns:
            The vectors, float32 ``[n, d]``.

        Raises:
            ExecutionError: TensorRT refuses the call, or it fails.
        """
        assert list(names) == [self._output]
        for name, values in feeds.items():
            self._program.must(
                self._context.set_input_shape(name, values.shape), f"give {name} the shape {values.shape}"
            )
            staged = self._host[name][: values.size]
            staged[:] = values.ravel()
            self._device.upload(self._buffers[name], staged)
        self._program.must(self._context.execute_async_v3(self._device.stream), "run")
        vectors = self._vectors[: len(next(iter(feeds.values())))]
        self._device.download(vectors, self._buffers[self._output])
        self._device.wait()
        return [vectors.copy()]
