"""What will execute an engine, and which schemes it can run."""

from dataclasses import dataclass, replace

from llmopt.optimizer.scheme import Scheme

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True, slots=True)
class Target:
    """An executor of engines.

    Attributes:
        name: As in a recipe.
        graph_passes: The graph passes its lowering of decoders consists of, in order: file names in ``passes/graph/``.
        encoder_passes: Those of its lowering of encoders.
    """

    name: str
    graph_passes: tuple[str, ...]
    encoder_passes: tuple[str, ...]

    def with_kernels(self) -> "Target":
        """The same with llmopt's own kernels at the end of the lowering of decoders."""
        return replace(self, graph_passes=(*self.graph_passes, "use_kernels"))

    def refusal(self, scheme: Scheme, *, experts: bool = False) -> str | None:
        """Why this target cannot run ``scheme`` in a linear, or in the experts of a mixture; None when it can."""
        if experts and scheme.input_activations is not None:
            return "the cpu target has no kernel for experts that quantizes activations; W8A16 and W4A16 leave them"
        if scheme.weights.type == "float":
            return _fp8_refusal(scheme, experts=experts)
        return _inputs_refusal(scheme) or _weights_refusal(scheme)


def _fp8_refusal(scheme: Scheme, *, experts: bool) -> str | None:
    """FP8 is computed in float32, from weights that become floats when the engine is loaded."""
    inputs = scheme.input_activations
    if experts:
        return "the cpu target has no FP8 experts"
    if inputs is None:
        return None
    by_row = inputs.dynamic and inputs.strategy in ("token", "group")
    if inputs.type != "float" or not (by_row or (not inputs.dynamic and inputs.strategy == "tensor")):
        return (
            "with FP8 weights the cpu target rounds activations to FP8: dynamic per token or group, static per tensor"
        )
    return None


def _inputs_refusal(scheme: Scheme) -> str | None:
    weights, inputs = scheme.weights, scheme.input_activations
    if inputs is None:
        return None
    how = (inputs.num_bits, inputs.type, inputs.symmetric, inputs.strategy, inputs.dynamic)
    if how not in ((8, "int", True, "token", True), (8, "int", True, "tensor", False)):
        return (
            "the cpu target quantizes activations of integer weights to symmetric int8, dynamic per token or "
            "static per tensor, or not at all"
        )
    if not (weights.num_bits == 8 and weights.symmetric and weights.strategy in ("channel", "tensor")):
        return "with int8 activations the cpu target needs symmetric int8 weights with one scale per channel or tensor"
    return None


def _weights_refusal(scheme: Scheme) -> str | None:
    weights = scheme.weights
    if weights.strategy not in ("tensor", "channel", "group"):
        return "the cpu target takes integers' scales per tensor, per channel or per group"
    if weights.group_size is not None and weights.group_size % 16:
        return f"the cpu target needs a group size that is a multiple of 16, not {weights.group_size}"
    return None


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

TARGETS = {
    "cpu": Target(
        name="cpu",
        graph_passes=(
            "select_rows",
            "fuse_norm",
            "fuse_activation",
            "fuse_qkv",
            "fuse_gate_up",
            "lower_attention",
            "lower_embedding",
            "lower_experts",
            *_TO_KERNELS,
        ),
        encoder_passes=(
            "fuse_self_attention",
            "lower_embedding",
            *_TO_KERNELS,
        ),
    ),
}
