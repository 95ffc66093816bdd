"""What a checkpoint format is to the exporter: how it stores quantized linears, and how its config speaks of them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from llmopt.exporters.checkpoint.shards import Part
from llmopt.optimizer.decoder import Experts
from llmopt.optimizer.model import Model, QuantWeight
from llmopt.optimizer.scheme import Scheme

__all__ = ["Layout", "linears_in_float", "packed_linears"]


class Layout(ABC):
    """One format. Everything that it does not store packed is written in float.

    Attributes:
        scale_dtype: Of scales, whatever the dtype of the floats is; None: the same.
    """

    scale_dtype: torch.dtype | None = None

    @abstractmethod
    def refusal(self, scheme: Scheme, shape: tuple[int, ...] | None = None) -> str | None:
        """Why the format has no place for a scheme, in a weight of ``shape`` where that is known; None where it has."""

    def model_refusal(self, packed: Mapping[str, QuantWeight]) -> str | None:  # noqa: ARG002 - for those that care
        """Why the format cannot have all of these weights in one checkpoint; None where it can."""
        return None

    @abstractmethod
    def part(self, module: str, weight: QuantWeight, dtype: torch.dtype) -> Part:
        """A quantized linear's tensors: its integers as they are, its scales in ``dtype``."""

    @abstractmethod
    def config(self, model: Model, packed: Mapping[str, QuantWeight]) -> dict[str, Any]:
        """The ``quantization_config`` of a model of which ``packed`` are stored packed."""

    @property
    def side_file(self) -> str | None:
        """A file with the same config that older loaders read."""
        return None


def packed_linears(model: Model) -> dict[str, QuantWeight]:
    """Linears that are stored quantized, by module; not a tied head, in whose table rows are looked up."""
    modules = [module for module in model.linears() if module != model.arch.head or not model.is_tied]
    weights = {module: model.weights[model.weight_of(module)] for module in modules}
    return {module: weight for module, weight in weights.items() if isinstance(weight, QuantWeight)}


def linears_in_float(model: Model, packed: Mapping[str, QuantWeight]) -> list[str]:
    """Every other linear, which loaders have to be told of by name: routers, projections, and the head when tied."""
    decoder = model.decoder
    modules = [layer.mlp.router for layer in decoder.layers if isinstance(layer.mlp, Experts)]
    modules += [each for each in (decoder.project_in, decoder.project_out) if each is not None]
    return modules + [module for module in model.linears() if module not in packed]
