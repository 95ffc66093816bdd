"""Opens a compiled TensorRT engine and makes the contexts it runs in.

Never executed on hardware: no machine of this project has a GPU. The names of the API are those of the installed
tensorrt-rtx; a fake of them runs in tests/runtime/backends.
"""

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmopt.optimizer.errors import MissingExtraError, ResourceError, UnsupportedError
from llmopt.optimizer.manifest import EncoderEngine, Engine
from llmopt.runtime.backends.base import ExecutionError
from llmopt.runtime.backends.device import Device

__all__ = ["DECODE", "PACKAGES", "PREFILL", "TEXTS", "Program", "compiled_for", "open_program", "tensorrt_package"]

logger = logging.getLogger(__name__)

PACKAGES = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
"""Python packages that run compiled engines, and the extras that bring them. What one has compiled the other cannot
open: an engine's features name the one that did."""

PREFILL, DECODE = 0, 1
"""The two optimization profiles of every decoder's engine."""

TEXTS = 0
"""The one of an encoder's."""


def tensorrt_package(features: Sequence[str]) -> Any:
    """The module that an engine with these features needs; the first that is installed where none is named.

    Raises:
        MissingExtraError: It is not installed.
    """
    named = [name for name in PACKAGES if name in features]
    for name in named or PACKAGES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    missing = (named or list(PACKAGES))[0]
    raise MissingExtraError(PACKAGES[missing], PACKAGES[missing])


def compiled_for(engine: Engine | EncoderEngine, device: Device) -> str:
    """The file that was compiled for this GPU, relative to the build.

    Raises:
        UnsupportedError: There is none.
    """
    if device.architecture not in engine.compiled:
        found = ", ".join(sorted(engine.compiled)) or "no GPU"
        raise UnsupportedError(
            f"the build has no engine for this GPU, an {device.name} ({device.architecture}); it has been compiled "
            f"for {found}",
            hint=f"add {device.architecture} to the targets of tensorrt in the recipe and build again",
        )
    return engine.compiled[device.architecture]


def open_program(directory: Path, engine: Engine | EncoderEngine, device: Device) -> "Program":
    """Load what was compiled of ``engine`` for this GPU.

    Raises:
        MissingExtraError: TensorRT is not installed.
        UnsupportedError: Nothing was compiled for this GPU, or this TensorRT cannot open it, or it is another engine
            than the manifest describes.
        ResourceError: It does not fit in the GPU's memory.
    """
    path = directory / compiled_for(engine, device)
    trt = tensorrt_package(engine.features)
    log = _log(trt)
    runtime = trt.Runtime(log)
    loaded = runtime.deserialize_cuda_engine(path.read_bytes())
    if loaded is None:
        raise UnsupportedError(
            f"{trt.__name__} {trt.__version__} cannot open {path}: {log.last()}",
            hint="the version that opens an engine has to be the one that compiled it: build it again with this one",
        )
    program = Program(trt, loaded, device, log=log, runtime=runtime)
    program.check(engine)
    return program


class Program:
    """A loaded engine. Its contexts share one block of scratch memory, so only one of them runs at a time.

    Args:
        trt: The package that loaded it.
        loaded: Its ICudaEngine.
        device: Where it runs.
        log: What the package's messages go to; ``last()`` is the last error.
        runtime: What the engine needs as long as it lives.
    """

    def __init__(self, trt: Any, loaded: Any, device: Device, *, log: Any, runtime: Any) -> None:
        self._trt = trt
        self._loaded = loaded
        self._device = device
        self._log = log
        self._runtime = runtime
        self._scratch_bytes = int(loaded.device_memory_size_v2)
        self._scratch = device.allocate(max(self._scratch_bytes, 1))

    def check(self, engine: Engine | EncoderEngine) -> None:
        """Refuse to run it as something that it is not.

        Raises:
            UnsupportedError: Its tensors, profiles or shared memory are not what the manifest describes.
        """
        loaded = self._loaded
        described = {tensor.name for tensor in [*engine.inputs, *engine.outputs]}
        found = {loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)}
        if described != found:
            names = ", ".join(sorted(described ^ found))
            raise UnsupportedError(f"the engine and its manifest disagree about {names}", hint="build it again")
        if isinstance(engine, EncoderEngine):
            return
        self._check_caches(engine)
        if loaded.num_optimization_profiles <= DECODE:
            raise UnsupportedError("the engine has no profile of its own for decoding", hint="build it again")

    def _check_caches(self, engine: Engine) -> None:
        """Whether caches have the manifest's shape and type, by which the pool is made, and are written in place.

        Raises:
            UnsupportedError: They do not.
        """
        kinds = {"float16": self._trt.DataType.HALF, "bfloat16": self._trt.DataType.BF16}
        wanted = (-1, engine.kv_heads, engine.capacity, engine.head_dim), kinds.get(engine.kv_dtype)
        for output in engine.outputs:
            if not output.name.startswith("present."):
                continue
            past = "past." + output.name.removeprefix("present.")
            if self._loaded.get_aliased_input_tensor(output.name) != past:
                raise UnsupportedError(
                    f"the engine does not write {output.name} in place: every step would copy the whole cache",
                    hint="build it again with a TensorRT that updates caches in place",
                )
            if (tuple(self._loaded.get_tensor_shape(past)), self._loaded.get_tensor_dtype(past)) != wanted:
                raise UnsupportedError(f"the engine and its manifest disagree about {past}", hint="build it again")

    def context(self, profile: int) -> Any:
        """A new context of one of the profiles, over the shared scratch memory.

        Raises:
            ResourceError: TensorRT cannot make one.
        """
        trt, managed = self._trt, self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if profile == DECODE and hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # TensorRT for RTX compiles kernels for a shape while it runs. There are few shapes in decoding, and a graph
            # has to capture these kernels, not those that fill in for them; a prompt's chunks have hundreds.
            config = self._loaded.create_runtime_config()
            config.set_execution_context_allocation_strategy(managed)
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
            context = self._loaded.create_execution_context(config)
        else:
            context = self._loaded.create_execution_context(managed)
        if context is None:
            raise ResourceError(f"TensorRT cannot make a context: {self._log.last()}")
        context.set_device_memory(self._scratch, self._scratch_bytes)
        self.must(context.set_optimization_profile_async(profile, self._device.stream), "select a profile")
        return context

    def must(self, is_done: bool, what: str) -> None:
        """Raise what TensorRT says where it could not do something.

        Raises:
            ExecutionError: ``is_done`` is False.
        """
        if not is_done:
            raise ExecutionError(f"TensorRT could not {what}: {self._log.last()}")


def _log(trt: Any) -> Any:
    """A logger of TensorRT's that keeps the last error, and passes everything on to Python's."""
    errors = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._last = "no reason was given"

        def log(self, severity: Any, message: str) -> None:
            if severity in errors:
                self._last = message
            logger.debug("%s", message)

        def last(self) -> str:
            return self._last

    return Log()
