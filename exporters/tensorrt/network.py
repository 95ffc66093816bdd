"""What TensorRT made of a graph when it parsed it: its layers, and whether they are what was meant."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from llmopt.exporters.tensorrt.compiler import Profile
from llmopt.exporters.tensorrt.package import Package
from llmopt.optimizer.errors import VerificationError

__all__ = ["check_network", "describe_network"]

_THROUGH = ("SHUFFLE", "CAST", "IDENTITY")
"""Layers that a weight may pass between where it is made from integers and where it is multiplied."""
_NEVER_FLOAT = ("MATRIX_MULTIPLY", "ATTENTION_INPUT", "ATTENTION_OUTPUT", "KV_CACHE_UPDATE", "ROTARY_EMBEDDING")


def check_network(network: Any, graph: ir.Model) -> dict[str, int]:
    """Whether TensorRT's network computes as the graph was meant to be computed.

    Args:
        network: As parsed.
        graph: What was parsed.

    Returns:
        How many of each were found: products, products with quantized weights, caches updated in place.

    Raises:
        VerificationError: A quantized product is fed by floats, a layer computes in float32, or a cache is copied.
    """
    layers = list(_layers(network))
    makers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    products = [layer for layer in layers if _kind(layer) == "MATRIX_MULTIPLY"]
    quantized = [layer for layer in products if _is_dequantized(layer.get_input(1), makers)]
    meant = [str(node.name) for node in graph.graph if node.op_type == "MatMul" and _reads_integers(node)]
    if len(quantized) < len(meant):
        found = {layer.name for layer in quantized}
        lost = [name for name in meant if name not in found] or meant
        raise VerificationError(f"TensorRT multiplies {lost[0]} with floats, though its weights are quantized")
    if wide := [each for each in layers if _kind(each) in _NEVER_FLOAT and _dtype(each.get_output(0)) == "FLOAT"]:
        raise VerificationError(f"TensorRT computes {wide[0].name} ({_kind(wide[0])}) in float32")
    updated = _caches(network, layers)
    return {"products": len(products), "quantized": len(quantized), "caches in place": updated}


def describe_network(
    network: Any, package: Package, profiles: Sequence[Profile], bindings: Mapping[str, Sequence[int | str]], path: Path
) -> None:
    """Write what an engine is made of to a JSON file: an engine can be opened on its own GPU only.

    Args:
        network: As parsed.
        package: Parsed it.
        profiles: The engine's.
        bindings: Dimensions of inputs and outputs, by name.
        path: The file.
    """
    described = {
        "package": package.name,
        "version": package.version,
        "bindings": {name: list(dims) for name, dims in bindings.items()},
        "profiles": {profile.name: {dim: list(sizes) for dim, sizes in profile.sizes.items()} for profile in profiles},
        "layers": [
            {"name": layer.name, "type": _kind(layer), "dtype": _dtype(layer.get_output(0))}
            for layer in _layers(network)
        ],
    }
    path.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(i) for i in range(network.num_layers))


def _kind(layer: Any) -> str:
    """A layer's type by the name in its enumeration."""
    return str(layer.type).rpartition(".")[2]


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).rpartition(".")[2]


def _reads_integers(node: ir.Node) -> bool:
    """Whether a MatMul's second operand is a DequantizeLinear of it, or the transpose of one."""
    maker = node.inputs[1].producer() if node.inputs[1] is not None else None
    if maker is not None and maker.op_type == "Transpose" and maker.inputs[0] is not None:
        maker = maker.inputs[0].producer()
    return maker is not None and maker.op_type == "DequantizeLinear"


def _is_dequantized(tensor: Any, makers: Mapping[str, Any]) -> bool:
    while (maker := makers.get(tensor.name)) is not None and _kind(maker) in _THROUGH:
        tensor = maker.get_input(0)
    return maker is not None and _kind(maker) == "DEQUANTIZE"


def _caches(network: Any, layers: Sequence[Any]) -> int:
    """How many caches are updated where they are.

    Raises:
        VerificationError: One is not.
    """
    inputs = {network.get_input(i).name for i in range(network.num_inputs)}
    outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    updates = [layer for layer in layers if _kind(layer) == "KV_CACHE_UPDATE"]
    kept = {
        each.get_output(0).name
        for each in updates
        if each.get_input(0).name in inputs and each.get_output(0).name in outputs
    }
    copied = sorted(name for name in outputs - kept if name.startswith("present."))
    if copied:
        raise VerificationError(f"TensorRT copies the cache {copied[0]} instead of updating it in place")
    return len(kept)
