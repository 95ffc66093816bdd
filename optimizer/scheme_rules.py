"""Which schemes the kernels of each target can run: why not, or None."""

from llmopt.optimizer.scheme import Scheme

__all__ = ["cpu_refusal", "cuda_refusal", "tensorrt_refusal"]


def cpu_refusal(scheme: Scheme, *, experts: bool) -> str | None:
    """Of ONNX Runtime's kernels for the CPU, and our own."""
    if experts and scheme.input_activations is not None:
        return "the cpu target has no kernel for experts that quantizes activations; W8A16 and W4A16 leave them"
    if scheme.weights.type == "float":
        return _cpu_fp8_refusal(scheme, experts=experts)
    return _cpu_inputs_refusal(scheme) or _sharing_refusal(scheme, "cpu")


def _cpu_fp8_refusal(scheme: Scheme, *, experts: bool) -> str | None:
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


def _cpu_inputs_refusal(scheme: Scheme) -> str | None:
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


def _sharing_refusal(scheme: Scheme, target: str) -> str | None:
    """Of ONNX Runtime's kernels for blocks of weights, by what shares a scale."""
    weights = scheme.weights
    if weights.strategy not in ("tensor", "channel", "group"):
        return f"the {target} target takes integers' scales per tensor, per channel or per group"
    if weights.group_size is not None and weights.group_size % 16:
        return f"the {target} target needs a group size that is a multiple of 16, not {weights.group_size}"
    return None


def cuda_refusal(scheme: Scheme, *, experts: bool) -> str | None:
    """Of ONNX Runtime's kernels for CUDA, by its own list of them (docs/OperatorKernels.md); none was run."""
    weights = scheme.weights
    if experts:
        return "the cuda target has no mixtures of experts"
    if scheme.input_activations is not None:
        return (
            "ONNX Runtime's CUDA provider has no kernel that multiplies rounded activations; W8A16 and W4A16 leave them"
        )
    if weights.type == "float":
        return "ONNX Runtime's CUDA provider has no kernel for FP8 weights; W8A16 takes as many bits"
    if weights.num_bits not in (4, 8):
        return f"ONNX Runtime's CUDA provider has kernels for weights of 4 and 8 bits, not {weights.num_bits}"
    return _sharing_refusal(scheme, "cuda")


def tensorrt_refusal(scheme: Scheme, *, experts: bool) -> str | None:
    """Of TensorRT, found by building engines with tensorrt_rtx 1.7 (docs/tensorrt.md has the table)."""
    weights, inputs = scheme.weights, scheme.input_activations
    if experts:
        return "the tensorrt target has no kernel for quantized experts; experts: none keeps them in float"
    if not weights.symmetric:
        return "TensorRT takes no zero points: the tensorrt target needs symmetric weights, as in W4A16"
    if inputs is None:
        return None
    if inputs.dynamic:
        return (
            f"TensorRT has no scales of {'FP8' if inputs.type == 'float' else 'int8'} inputs that are found while it "
            "runs: the tensorrt target needs static ones, as in W8A8_STATIC or FP8"
        )
    if inputs.strategy != "tensor" or not inputs.symmetric or inputs.num_bits != 8:
        return "the tensorrt target rounds inputs to 8 bits with one symmetric scale for each linear, or not at all"
    if weights.type != inputs.type or weights.num_bits != 8:
        return "the tensorrt target multiplies inputs of 8 bits with weights of the same type: int8 or FP8"
    if weights.strategy not in ("channel", "tensor"):
        return "with rounded inputs the tensorrt target needs weights with one scale per channel or tensor"
    return None
