"""Opens ONNX Runtime's sessions: on the CPU, or on a GPU by one of its execution providers, and nowhere else silently.

The providers for GPUs were never executed: no machine of this project has a GPU.
"""

import contextlib
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from llmopt.optimizer import kernels
from llmopt.optimizer.errors import InputError, MissingExtraError, UnsupportedError
from llmopt.optimizer.instructions import VNNI, host_instructions
from llmopt.optimizer.manifest import LORA_FEATURE

__all__ = ["PROVIDERS", "Provider", "ProviderName", "check_features", "onnxruntime_with", "open_session", "ort_errors"]

logger = logging.getLogger(__name__)

ProviderName: TypeAlias = Literal["cpu", "cuda", "nv_tensorrt_rtx"]

PROVIDERS: Mapping[ProviderName, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "nv_tensorrt_rtx": "NvTensorRTRTXExecutionProvider",
}
"""What the command line calls an execution provider, and what ONNX Runtime does."""

_KNOWN_FEATURES = frozenset({"int8_kv", kernels.FEATURE, VNNI, LORA_FEATURE, "tensorrt", "tensorrt_rtx"})

_OF_LENGTHS = frozenset(
    {"Add", "Cast", "Concat", "Gather", "Max", "Range", "ReduceMax", "Reshape", "Shape", "Size", "Slice", "Squeeze"}
    | {"Sub", "Unsqueeze"}
)
"""Operators that compute lengths and shapes. A GPU's provider itself leaves these to the CPU, where their results are
needed; with session.disable_cpu_ep_fallback no graph that has any could be loaded."""


@dataclass(frozen=True, slots=True)
class Provider:
    """What of ONNX Runtime executes a graph.

    Attributes:
        name: As on the command line.
        options: Its own, passed on as they are.
    """

    name: ProviderName = "cpu"
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where its tensors lie, in ONNX Runtime's words."""
        return "cpu" if self.name == "cpu" else "cuda"

    @property
    def device_id(self) -> int:
        """Which of the machine's GPUs.

        Raises:
            InputError: The option says something else than a number.
        """
        number = self.options.get("device_id", "0")
        if not number.isdecimal():
            raise InputError(f"device_id={number} is no number of a GPU", hint="--provider-option device_id=0")
        return int(number)


def check_features(features: Sequence[str]) -> None:
    """Refuse an engine that needs something else than this llmopt and this machine have.

    Raises:
        UnsupportedError: Naming what.
    """
    if unknown := sorted(set(features) - _KNOWN_FEATURES):
        raise UnsupportedError(
            f"the engine needs what this llmopt does not know: {', '.join(unknown)}", hint="install a newer llmopt"
        )
    if kernels.FEATURE in features and kernels.library() is None:
        raise UnsupportedError(
            "the engine uses llmopt's kernels, and this llmopt was installed without them",
            hint="install a C++ compiler and llmopt again, or build the engine with kernels: onnxruntime",
        )
    if VNNI in features and host_instructions() != VNNI:
        raise UnsupportedError(
            "the engine was lowered for a CPU with VNNI: on this one its integer products would overflow, or its rows "
            "depend on what shares their batch",
            hint="build it on a machine like this one: what is built here runs there too",
        )


def open_session(graph: Path | bytes, threads: int, *, provider: Provider | None = None, packed: bool = True) -> Any:
    """An ONNX Runtime session of a graph.

    Args:
        graph: Its file, or what would be in it.
        threads: Of one run.
        provider: What executes it; the CPU when omitted.
        packed: Whether ONNX Runtime copies weights into its kernels' own layout.

    Raises:
        MissingExtraError: onnxruntime, or the one for GPUs, is not installed.
        UnsupportedError: It cannot load the graph, or not all of it on the GPU.
    """
    provider = provider or Provider()
    ort = onnxruntime_with(provider)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised, and said once
    # The lowering has fused what gains by it, and was verified. ONNX Runtime's own fusions would follow unverified, to
    # kernels of which some are slower (BiasGelu, SkipLayerNormalization).
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # FP8 weights have no kernel: without this they would be turned into floats in every call instead of once.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Between two runs the cores belong to the server; idle worker threads that spin would take them.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.disable_prepacking", str(int(not packed)))
    if provider.name == "cpu":
        kernels.register(options)
    else:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    chosen = [(PROVIDERS[provider.name], dict(provider.options))]
    try:
        session = ort.InferenceSession(graph, options, providers=chosen)
        _check_placement(session, provider)
    except ort_errors() as error:
        what = graph if isinstance(graph, Path) else "a graph"
        raise UnsupportedError(
            f"ONNX Runtime {ort.__version__} cannot load {what}: {error}", hint="build it again, or update onnxruntime"
        ) from error
    return session


def ort_errors() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions, which have no common base; a failing kernel raises a plain RuntimeError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
    return (RuntimeError, *(getattr(state, name) for name in (*names, "RuntimeException")))


def onnxruntime_with(provider: Provider) -> Any:
    """The package, which has the provider.

    Raises:
        MissingExtraError: It is not installed.
        UnsupportedError: It has another set of providers.
    """
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnxruntime", "cpu" if provider.name == "cpu" else "gpu") from error
    if PROVIDERS[provider.name] not in ort.get_available_providers():
        raise UnsupportedError(
            f"the installed ONNX Runtime {ort.__version__} has no {PROVIDERS[provider.name]}; it has "
            f"{', '.join(ort.get_available_providers())}",
            hint="pip uninstall onnxruntime, then pip install 'llmopt[gpu]', which brings onnxruntime-gpu; or "
            "--provider cpu"
            if provider.name == "cuda"
            else "install an onnxruntime that was built with TensorRT for RTX",
        )
    if provider.name != "cpu":
        # CUDA's libraries may have come as packages of Python, where no loader looks. It prints what it does not find.
        with contextlib.redirect_stdout(io.StringIO()) as said:
            ort.preload_dlls()
        logger.debug("%s", said.getvalue())
    return ort


def _check_placement(session: Any, provider: Provider) -> None:
    """Refuse a session of which the GPU's provider computes less than all but lengths and shapes.

    Raises:
        UnsupportedError: Naming what would be computed where.
    """
    if provider.name == "cpu":
        return
    wanted = PROVIDERS[provider.name]
    if wanted not in session.get_providers():
        raise UnsupportedError(
            f"ONNX Runtime's {wanted} could not be started",
            hint="the GPU's driver, CUDA or cuDNN is missing or of another version than onnxruntime-gpu needs",
        )
    strayed = sorted(
        f"{node.op_type} {node.name}".strip()
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != wanted
        for node in part.get_nodes()
        if node.domain not in ("", "ai.onnx") or node.op_type not in _OF_LENGTHS
    )
    if strayed:
        more = f" and {len(strayed) - 3} more" if len(strayed) > 3 else ""
        raise UnsupportedError(
            f"{wanted} would leave {', '.join(strayed[:3])}{more} to the CPU",
            hint="update onnxruntime-gpu, or serve the build's engine for the cpu",
        )
