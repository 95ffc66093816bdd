"""What will execute an engine, and which schemes it can run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from llmopt.optimizer.scheme import Scheme
from llmopt.optimizer.scheme_rules import cpu_refusal, cuda_refusal, tensorrt_refusal

__all__ = ["HALF", "TARGETS", "Target"]


class _Rules(Protocol):
    """Why a target cannot run a scheme, or None; see ``optimizer/scheme_rules.py``."""

    def __call__(self, scheme: Scheme, *, experts: bool) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Target:
    """An executor of engines.

    Attributes:
        name: As in a recipe.
        graph_passes: The graph passes its lowering of decoders consists of, in order: file names in ``passes/graph/``.
        encoder_passes: Those of its lowering of encoders.
        rules: Which schemes its kernels run.
        options: Of graph passes that need some, by name.
    """

    name: str
    graph_passes: tuple[str, ...]
    encoder_passes: tuple[str, ...]
    rules: _Rules
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def with_kernels(self) -> "Target":
        """The same with llmopt's own kernels at the end of the lowering of decoders."""
        return replace(self, graph_passes=(*self.graph_passes, "use_kernels"))

    def with_adapters(self) -> "Target":
        """The same, with kernels, for engines that take adapters."""
        passes = list(self.with_kernels().graph_passes)
        passes.insert(passes.index("inline_composites"), "lower_lora")
        return replace(self, graph_passes=tuple(passes))

    def in_precision(self, dtype: str) -> "Target":
        """The same computing in ``float16``, ``bfloat16`` or, for comparing, ``float32``."""
        if dtype == "float32":
            kept = (tuple(name for name in each if name != HALF) for each in (self.graph_passes, self.encoder_passes))
            graph_passes, encoder_passes = kept
            return replace(self, graph_passes=graph_passes, encoder_passes=encoder_passes)
        return replace(self, options={**self.options, HALF: {"dtype": dtype}})

    def refusal(self, scheme: Scheme, *, experts: bool = False) -> str | None:
        """Why this target cannot run ``scheme`` in a linear, or in the experts of a mixture; None when it can."""
        return self.rules(scheme, experts=experts)


HALF = "use_half_precision"
"""The graph pass after which floats have 16 bits."""

_TO_KERNELS = (
    "share_activation_quantization",
    "lower_linear",
    "inline_composites",
    "fold_constants",
    "eliminate_common_subexpressions",
    "eliminate_dead_code",
    "share_weights",
)
"""How every lowering for the CPU ends, of decoders and encoders."""

_TO_TENSORRT = (
    "share_activation_quantization",
    "inline_composites",
    "expand_attention",
    "fold_constants",
    "use_signed_activations",
    "eliminate_common_subexpressions",
    "eliminate_dead_code",
    "share_weights",
    HALF,
)
"""How every lowering for TensorRT ends: operators of ai.onnx only, in 16 bits."""

_DECODERS = (
    "select_rows",
    "fuse_norm",
    "fuse_activation",
    "fuse_qkv",
    "fuse_gate_up",
    "lower_attention",
    "lower_embedding",
)
"""How every lowering of decoders for ONNX Runtime begins."""

TARGETS = {
    "cpu": Target(
        name="cpu",
        graph_passes=(
            *_DECODERS,
            "lower_experts",
            *_TO_KERNELS,
        ),
        encoder_passes=(
            "fuse_self_attention",
            "lower_embedding",
            *_TO_KERNELS,
        ),
        rules=cpu_refusal,
    ),
    "cuda": Target(
        name="cuda",
        graph_passes=(*_DECODERS, *_TO_KERNELS, "lower_norm", HALF, "lower_opset"),
        encoder_passes=(),
        rules=cuda_refusal,
        options={"lower_linear": {"executor": "cuda"}, "lower_embedding": {"executor": "cuda"}},
    ),
    "tensorrt": Target(
        name="tensorrt",
        graph_passes=("select_rows", *_TO_TENSORRT),
        encoder_passes=("fuse_self_attention", *_TO_TENSORRT),
        rules=tensorrt_refusal,
    ),
}
