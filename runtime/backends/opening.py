"""Which of a build's engines is executed, and by what: the one place that knows all backends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

from llmopt.optimizer.errors import InputError, LlmoptError
from llmopt.optimizer.manifest import EncoderEngine, Engine, Manifest
from llmopt.runtime.backends import encoder
from llmopt.runtime.backends.base import Backend
from llmopt.runtime.backends.encoder import EncoderBackend
from llmopt.runtime.backends.session import PROVIDERS, Provider, ProviderName, onnxruntime_with
from llmopt.runtime.sizing import has_fixed_capacity

__all__ = [
    "Executor",
    "ExecutorKind",
    "free_memory",
    "open_backend",
    "open_encoder_backend",
    "pick_encoder",
    "pick_engine",
    "runs_here",
    "slot_capacity",
]

ExecutorKind: TypeAlias = Literal["onnx", "tensorrt"]

AnyEngine = TypeVar("AnyEngine", Engine, EncoderEngine)

_FASTEST = ("tensorrt", "cuda", "cpu")
"""Targets of engines, the fastest first. The CPU executes the graphs of all of them where somebody asks it to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Executor:
    """What somebody wants a build to be executed by.

    Attributes:
        engine: Which kind of engine; the best that runs here when None.
        provider: What of ONNX Runtime executes it; by the engine's target when None.
        provider_options: The provider's own.
        cuda_graphs: Whether TensorRT's decode calls are captured and replayed.
    """

    engine: ExecutorKind | None = None
    provider: ProviderName | None = None
    provider_options: Mapping[str, str] = field(default_factory=dict)
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        """Check that the parts agree.

        Raises:
            InputError: They do not.
        """
        if self.provider_options and self.provider in (None, "cpu"):
            raise InputError(
                "options of a provider were given, and no provider that has any", hint="--provider cuda, for example"
            )
        if self.engine == "tensorrt" and self.provider is not None:
            raise InputError(
                "TensorRT itself executes its engines, and a provider is a part of ONNX Runtime",
                hint="leave --engine out; --provider nv_tensorrt_rtx has ONNX Runtime execute the graph",
            )

    def check_encoder(self) -> None:
        """Refuse to execute an encoder by anything but what does it.

        Raises:
            InputError: Something else is wanted.
        """
        if self != Executor(engine=self.engine):
            raise InputError(
                "an encoder's engine runs in ONNX Runtime on the CPU, or in TensorRT without CUDA graphs",
                hint="leave everything but --engine out",
            )

    def provider_of(self, engine: Engine | EncoderEngine) -> Provider:
        """What of ONNX Runtime executes ``engine``."""
        by_target: ProviderName = "cuda" if engine.target == "cuda" else "cpu"
        return Provider(self.provider or by_target, self.provider_options)

    def uses_tensorrt(self, engine: Engine | EncoderEngine) -> bool:
        """Whether TensorRT itself executes ``engine``."""
        return engine.exporter == "tensorrt" and self.provider is None


def pick_engine(directory: Path, manifest: Manifest, executor: Executor) -> Engine:
    """The engine of a build that is to be executed: of those that fit what is wanted, the best that runs here.

    Where none runs here, whoever opens the best says what is missing.

    Raises:
        InputError: The build has none that fits.
    """
    fitting = [engine for engine in manifest.engines if _fits(engine, executor)]
    if fitting:
        return _best(fitting, executor)
    if manifest.encoders:
        raise InputError(
            f"{directory} is a build of an encoder ({manifest.architecture}), which continues no text",
            hint="llmopt serve makes vectors of texts with it, and in Python llmopt.runtime.encoder.Encoder",
        )
    found = ", ".join(f"{engine.exporter} for {engine.target}" for engine in manifest.engines) or "none"
    export = {"cuda": "{onnx: {target: cuda}}", "nv_tensorrt_rtx": "tensorrt"}.get(executor.provider or "")
    export = export or ("tensorrt" if executor.engine == "tensorrt" else "{onnx: {target: cpu}}")
    raise InputError(
        f"{directory} has no engine that {_words(executor)} executes (engines: {found})",
        hint=f"add 'export: [{export}]' to the recipe and build again",
    )


def pick_encoder(directory: Path, manifest: Manifest, executor: Executor) -> EncoderEngine:
    """The same of a build of an encoder.

    Raises:
        InputError: The build has none that fits, or is none of an encoder; or an encoder is not executed like that.
    """
    if not manifest.encoders:
        raise InputError(
            f"{directory} is no build of an encoder ({manifest.architecture})",
            hint="llmopt serve, chat and generate take it",
        )
    executor.check_encoder()
    fitting = [engine for engine in manifest.encoders if executor.engine in (None, engine.exporter)]
    if not fitting:
        found = ", ".join(engine.exporter for engine in manifest.encoders)
        raise InputError(
            f"{directory} has no engine that {_words(executor)} executes (engines: {found})",
            hint=f"add 'export: [{executor.engine}]' to the recipe and build again",
        )
    return _best(fitting, executor)


def open_encoder_backend(
    directory: Path, engine: EncoderEngine, executor: Executor | None = None, *, threads: int
) -> EncoderBackend:
    """Load an encoder's engine, by what executes it; arguments are those of ``open_backend``.

    Raises:
        LlmoptError: As the backends do.
    """
    if (executor or Executor()).uses_tensorrt(engine):
        from llmopt.runtime.backends import tensorrt_encoder

        return tensorrt_encoder.open_encoder_backend(directory, engine)
    return encoder.open_encoder_backend(directory, engine, threads=threads)


def open_backend(
    directory: Path,
    engine: Engine,
    executor: Executor | None = None,
    *,
    slots: int,
    capacity: int,
    threads: int,
    packed: bool = True,
) -> Backend:
    """Load an engine, by what executes it.

    Args:
        directory: The build.
        engine: As ``pick_engine`` has it.
        executor: The same that it was picked by.
        slots: Sequences held at the same time.
        capacity: Tokens per slot; see ``slot_capacity``.
        threads: Of one run on the CPU.
        packed: See ``onnxruntime.open_backend``.

    Raises:
        LlmoptError: As the backends do.
    """
    executor = executor or Executor()
    if executor.uses_tensorrt(engine):
        from llmopt.runtime.backends import tensorrt

        return tensorrt.open_backend(
            directory, engine, slots=slots, capacity=capacity, cuda_graphs=executor.cuda_graphs
        )
    from llmopt.runtime.backends import onnxruntime

    provider = executor.provider_of(engine)
    return onnxruntime.open_backend(
        directory, engine, slots=slots, capacity=capacity, threads=threads, packed=packed, provider=provider
    )


def runs_here(engine: Engine | EncoderEngine, executor: Executor) -> bool:
    """Whether this machine has what executes an engine."""
    if executor.uses_tensorrt(engine):
        return _has_gpu_of(engine)
    try:
        import onnxruntime as ort
    except ModuleNotFoundError:
        return False
    return PROVIDERS[executor.provider_of(engine).name] in ort.get_available_providers()


def slot_capacity(engine: Engine, tokens: int) -> int:
    """The size of a slot that holds ``tokens``: they have exactly the engine's own where it was compiled for one."""
    return engine.capacity if has_fixed_capacity(engine) else min(tokens, engine.capacity)


def free_memory(directory: Path, engine: Engine, executor: Executor) -> int | None:
    """Bytes that are free for keys and values on the GPU, the engine itself subtracted; None for those in the host.

    Raises:
        MissingExtraError: What asks the GPU is not installed.
        UnsupportedError: There is no GPU, or no ONNX Runtime for it.
    """
    if not executor.uses_tensorrt(engine) and executor.provider_of(engine).device == "cpu":
        return None
    from llmopt.runtime.backends.device import open_device
    from llmopt.runtime.backends.tensorrt_program import compiled_for

    in_tensorrt, provider = executor.uses_tensorrt(engine), executor.provider_of(engine)
    if in_tensorrt:
        device = open_device("tensorrt-rtx")
    else:
        onnxruntime_with(provider)
        device = open_device("gpu", index=provider.device_id)
    try:
        free = device.free_bytes()
        if in_tensorrt:
            weights = [directory / compiled_for(engine, device)]
        else:
            weights = [path for path in (directory / engine.path).parent.iterdir() if path.is_file()]
    finally:
        device.close()
    logits = 4 * engine.vocab_size * engine.max_chunk
    return max(free - logits - sum(path.stat().st_size for path in weights), 0)


def _best(fitting: Sequence[AnyEngine], executor: Executor) -> AnyEngine:
    """The fastest that runs here; the fastest where none does."""
    ranked = sorted(fitting, key=lambda engine: _FASTEST.index(engine.target), reverse=executor.provider == "cpu")
    return next((engine for engine in ranked if runs_here(engine, executor)), ranked[0])


def _fits(engine: Engine, executor: Executor) -> bool:
    """Whether an engine is what was asked for."""
    if executor.engine not in (None, engine.exporter):
        return False
    if executor.provider == "nv_tensorrt_rtx":
        return engine.exporter == "tensorrt"
    if executor.provider == "cuda":
        return engine.exporter == "onnx" and engine.target == "cuda"
    return (engine.exporter, engine.target) in (("tensorrt", "tensorrt"), ("onnx", "cuda"), ("onnx", "cpu"))


def _has_gpu_of(engine: Engine | EncoderEngine) -> bool:
    """Whether TensorRT and a GPU that the engine was compiled for are here."""
    from llmopt.runtime.backends.device import open_device
    from llmopt.runtime.backends.tensorrt_program import compiled_for, tensorrt_package

    try:
        tensorrt_package(engine.features)
        device = open_device("tensorrt-rtx")
    except LlmoptError:
        return False
    try:
        compiled_for(engine, device)
    except LlmoptError:
        return False
    finally:
        device.close()
    return True


def _words(executor: Executor) -> str:
    if executor.provider is not None:
        return f"ONNX Runtime's {PROVIDERS[executor.provider]}"
    return {"onnx": "ONNX Runtime", "tensorrt": "TensorRT", None: "this llmopt"}[executor.engine]
