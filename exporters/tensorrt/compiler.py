"""Parses a graph with TensorRT's own ONNX parser and compiles it, keeping what the compiler says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.exporters.tensorrt.package import Package
from llmopt.optimizer.errors import ResourceError, UnsupportedError

__all__ = ["Compiler", "Profile"]

_NO_DRIVER = "catchCudaError"
"""In messages about the missing driver, which are no news where nothing is executed."""


@dataclass(frozen=True, slots=True)
class Profile:
    """The sizes an engine is compiled for.

    Attributes:
        name: For people.
        sizes: The least, the usual and the greatest size of each dimension that varies, by its name.
    """

    name: str
    sizes: Mapping[str, tuple[int, int, int]]

    def shapes(self, dims: Sequence[int | str]) -> list[list[int]]:
        """The least, the usual and the greatest shape of an input with these dimensions."""
        return [[dim if isinstance(dim, int) else self.sizes[dim][i] for dim in dims] for i in range(3)]


class Compiler:
    """One graph, parsed once, and compiled for one GPU after the other.

    Attributes:
        network: TensorRT's own form of the graph.
        log: Its messages so far, a line each.

    Args:
        package: Compiles.
        path: The ONNX file; its weights are read from beside it.

    Raises:
        UnsupportedError: The parser refuses a node; it is named, with its operator.
    """

    def __init__(self, package: Package, path: Path) -> None:
        trt = package.trt
        self.log: list[str] = []
        self._package = package
        self._logger = _logger(trt, self.log)
        self._builder = trt.Builder(self._logger)
        self.network = self._builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(self.network, self._logger)
        if not parser.parse_from_file(str(path)):
            raise _parser_error(package, [parser.get_error(i) for i in range(parser.num_errors)])
        self._parser = parser  # it owns the weights that the network refers to

    def compile(
        self,
        target: str,
        profiles: Sequence[Profile],
        inputs: Mapping[str, Sequence[int | str]],
        *,
        workspace: int | None,
        timing_cache: Path,
    ) -> bytes:
        """The engine for one GPU.

        Args:
            target: The GPU, as ``sm89``.
            profiles: The engine's, in order.
            inputs: The dimensions of each input, by name.
            workspace: Bytes of memory that a kernel may take while it runs; None: what there is.
            timing_cache: The full TensorRT reads what it has learned of kernels' speed from this file, and writes it.

        Raises:
            UnsupportedError: The compiler has no kernel for something.
            ResourceError: It runs out of memory.
        """
        config = self._config(target, workspace)
        for profile in profiles:
            made = self._builder.create_optimization_profile()
            for name, dims in inputs.items():
                made.set_shape(name, *profile.shapes(dims))
            config.add_optimization_profile(made)
        times = None if self._package.compiles_ahead else self._times(config, timing_cache)
        self.log.append(f"compiling for {target}")
        first = len(self.log)
        try:
            engine = self._builder.build_serialized_network(self.network, config)
        except MemoryError as error:
            raise ResourceError(f"{self._package.title} ran out of memory compiling for {target}") from error
        if engine is None:
            said = [line for line in self.log[first:] if line.startswith("error")] or ["it does not say why"]
            raise UnsupportedError(
                f"{self._package.title} cannot compile the graph for {target}: {said[0]}",
                hint="the build log names the layer; another scheme or precision for it may do",
            )
        if times is not None:
            timing_cache.write_bytes(bytes(times.serialize()))
        return bytes(engine)

    def _times(self, config: Any, path: Path) -> Any:
        """What earlier compilations learned; TensorRT for RTX chooses kernels when it runs, and has no such file."""
        times = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        config.set_timing_cache(times, ignore_mismatch=True)
        return times

    def _config(self, target: str, workspace: int | None) -> Any:
        trt, config = self._package.trt, self._builder.create_builder_config()
        if self._package.compiles_ahead:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
        if workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            # TensorRT for RTX allocates memory while it runs otherwise, and then no CUDA graph can be captured.
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        return config


def _logger(trt: Any, log: list[str]) -> Any:
    """A logger of TensorRT that appends to ``log``; nothing is printed."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # its base is known when it runs
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING and _NO_DRIVER not in message:
                kind = "warning" if severity == trt.ILogger.Severity.WARNING else "error"
                log.append(f"{kind}: {' '.join(message.split())}")

    return Logger()


def _parser_error(package: Package, errors: Sequence[Any]) -> UnsupportedError:
    if not errors:
        return UnsupportedError(f"{package.title} cannot parse the graph and does not say why")
    error = errors[0]
    lines = [line for line in error.desc().splitlines() if line and _NO_DRIVER not in line]
    reason = lines[-1] if lines else error.desc()
    return UnsupportedError(
        f"{package.title} does not take the node {error.node_name()} ({error.node_operator()}): {reason}",
        hint="nodes are named after the module they compute: another scheme for that module may do",
    )
