"""What will execute an engine, and which schemes it can run."""

from dataclasses import dataclass

from llmopt.optimizer.scheme import Scheme

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True, slots=True)
class Target:
    """An executor of engines.

    Attributes:
        name: As in a recipe.
        graph_passes: The graph passes its lowering consists of, in order: file names in ``passes/graph/``.
    """

    name: str
    graph_passes: tuple[str, ...]

    def refusal(self, scheme: Scheme, *, experts: bool = False) -> str | None:
        """Why this target cannot run ``scheme`` in a linear, or in the experts of a mixture; None when it can."""
        weights, activations = scheme.weights, scheme.input_activations
        if weights.type != "int":
            return "the cpu target has no floating-point weight kernels"
        if experts and activations is not None:
            return "the cpu target has no kernel for experts that quantizes activations; W8A16 and W4A16 leave them"
        if activations is not None:
            per_token = activations.num_bits == 8 and activations.type == "int" and activations.strategy == "token"
            if not (per_token and activations.dynamic and activations.symmetric):
                return "the cpu target quantizes activations to int8 per token, dynamic and symmetric, or not at all"
            if not (weights.num_bits == 8 and weights.symmetric and weights.strategy == "channel"):
                return "with int8 activations the cpu target needs symmetric int8 weights with one scale per channel"
            return None
        if weights.num_bits not in (4, 8):
            return f"the cpu target has kernels for 4 and 8 bits, not for {weights.num_bits}"
        if weights.strategy not in ("channel", "group"):
            return "the cpu target takes weight scales per channel or per group"
        if weights.group_size is not None and weights.group_size % 16:
            return f"the cpu target needs a group size that is a multiple of 16, not {weights.group_size}"
        return None


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
            "share_activation_quantization",
            "lower_linear",
            "inline_composites",
            "fold_constants",
            "eliminate_common_subexpressions",
            "eliminate_dead_code",
            "share_weights",
        ),
    ),
}
