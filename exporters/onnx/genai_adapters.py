"""LoRA adapters beside a graph for onnxruntime-genai, in ONNX Runtime's own format: a file each, loaded when asked."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from llmopt.exporters.onnx.adapter_inputs import BIAS, DOWN, UP
from llmopt.exporters.onnx.weights import packed_order
from llmopt.optimizer.decoder import Decoder, Experts
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.lora.adapter import read_adapter
from llmopt.optimizer.lora.config import CONFIG_NAME, WEIGHTS_NAME, AdapterPath
from llmopt.optimizer.lora.factors import LoraFactors, factors_of
from llmopt.optimizer.manifest import PassRecord, sha256_of
from llmopt.optimizer.model import Model

__all__ = ["GenaiAdapter", "adapted_modules", "check_adapters", "read_adapters", "write_adapters"]

_FOLDER = "adapters"


class GenaiAdapter(BaseModel):
    """One adapter beside the graph."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: AdapterPath = Field(description="A folder that PEFT's save_pretrained wrote, relative to the recipe.")
    name: str = Field(
        pattern=r"^\w[\w.-]*$", description="Of its file: NAME.onnx_adapter; letters, digits, _, - and points."
    )


Adapters = Mapping[str, Mapping[str, LoraFactors]]
"""What each adapter adds to which linears, by their names."""


def check_adapters(options: Sequence[GenaiAdapter], model: Model) -> None:
    """Whether every adapter fits the model and can be given from outside; only headers are read.

    Raises:
        InputError: One is for another base.
        UnsupportedError: One changes more than linears by products of two factors.
    """
    possible = set(_possible(model))
    for option in options:
        adapter = read_adapter(option.path.place, model)
        if not adapter.is_low_rank:
            raise UnsupportedError(
                f"{option.path.text} has DoRA, or biases or weights that were trained whole: no products of factors",
                hint="merge_lora merges it; ONNX Runtime's adapters cannot hold it",
            )
        others = [name for name in adapter.changes if name.removesuffix(".weight") not in possible]
        if others:
            raise UnsupportedError(
                f"{option.path.text} changes {others[0]}, which is no linear of its own in the engine",
                hint="merge_lora merges it; ONNX Runtime's adapters change linears only",
            )


def _possible(model: Model) -> Iterator[str]:
    """Linears that the graph multiplies with one by one: no tables, no experts."""
    decoder = model.decoder
    yield from (name for name in (decoder.project_in, decoder.project_out) if name is not None)
    for layer in decoder.layers:
        yield from layer.attention.linears
        yield from (layer.mlp.router,) if isinstance(layer.mlp, Experts) else layer.mlp.linears
    if not model.is_tied:
        yield decoder.head


def read_adapters(options: Sequence[GenaiAdapter], model: Model) -> Adapters:
    """The factors of each for the model as passes left it.

    Raises:
        InputError: Values are not finite, or the adapter is for another base.
    """
    found = {}
    for option in options:
        factors = factors_of(read_adapter(option.path.place, model), model)
        for module, each in factors.items():
            if not all(_is_finite(values) for values in (each.down, each.up, each.bias)):
                raise InputError(
                    f"{option.path.text}: its factors for {module} have values that are not finite",
                    hint="its training has diverged",
                )
        found[option.name] = factors
    return found


def _is_finite(values: Tensor | None) -> bool:
    return values is None or bool(values.isfinite().all())


def adapted_modules(adapters: Adapters) -> dict[str, bool]:
    """The linears that any of them changes, and whether one adds a bias there."""
    modules: dict[str, bool] = {}
    for factors in adapters.values():
        for module, each in factors.items():
            modules[module] = modules.get(module, False) or each.bias is not None
    return modules


def write_adapters(adapters: Adapters, options: Sequence[GenaiAdapter], model: Model, folder: Path) -> PassRecord:
    """Write ``adapters/NAME.onnx_adapter`` of each below ``folder``, the graph's.

    Returns:
        What the manifest says of them.
    """
    from onnxruntime import AdapterFormat, OrtValue

    orders, details = _orders(model.decoder), {}
    (folder / _FOLDER).mkdir()
    for option in options:
        values = _parameters(adapters[option.name], orders)
        file = AdapterFormat()
        file.set_adapter_version(1)
        file.set_model_version(1)
        file.set_parameters({name: OrtValue.ortvalue_from_numpy(value) for name, value in sorted(values.items())})
        file.export_adapter(str(folder / _FOLDER / f"{option.name}.onnx_adapter"))
        files = [sha256_of(option.path.place / name) for name in (CONFIG_NAME, WEIGHTS_NAME)]
        details[option.name] = {"path": option.path.text, "linears": len(adapters[option.name]), "files": files}
    return PassRecord(name="write_adapters", changed=False, details=details)


def _parameters(factors: Mapping[str, LoraFactors], orders: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values of the graph's inputs by their names."""
    values = {}
    for module, each in factors.items():
        up, bias = each.up.numpy(), None if each.bias is None else each.bias.numpy()
        if (order := orders.get(module)) is not None:
            up, bias = up[order], None if bias is None else bias[order]
        values[f"{module}.{DOWN}"] = np.ascontiguousarray(each.down.numpy().T)
        values[f"{module}.{UP}"] = np.ascontiguousarray(up.T)
        if bias is not None:
            values[f"{module}.{BIAS}"] = np.ascontiguousarray(bias)
    return values


def _orders(decoder: Decoder) -> dict[str, np.ndarray]:
    """The rows of packed linears in the order in which the graph computes them, where that is another."""
    attentions = [layer.attention for layer in decoder.layers]
    return {each.packed: packed_order(each) for each in attentions if each.packed and each.packing == "groups"}
