"""What the quantizers that calibrate layer by layer share."""

from collections.abc import Iterable, Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from llmopt.calibration.clipping import Clipping
from llmopt.calibration.hessian import TokenWeighting
from llmopt.calibration.quantize_layers import LinearFacts
from llmopt.optimizer.assignment import SchemeQuantPass
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.model import Model, QuantWeight, Weight
from llmopt.optimizer.scheme import Scheme
from llmopt.optimizer.weight_rounding import round_weight

__all__ = ["CalibratedQuantPass", "layer_modules", "record_facts", "rounded_tables", "unreached"]


class CalibratedQuantPass(SchemeQuantPass):
    """A quantizer that looks at what enters the linears of each layer; embedding and head are rounded to nearest."""

    needs_calibration: ClassVar[bool] = True
    chooses_input_scales = "layers"

    token_weighting: TokenWeighting = Field(
        "unit_norm",
        description="How much a token counts: none (all the same), inverse_norm, or unit_norm, which keeps the few "
        "tokens with huge activations from deciding alone.",
    )
    clipping: Clipping = Field(
        "activations",
        description="How a group's range is chosen: none (all values fit), weights (least squared error), activations "
        "(least squared error, each column by its activations).",
    )


def layer_modules(model: Model, assigned: Mapping[str, Scheme]) -> list[str]:
    """Those of the assigned modules that lie in decoder layers."""
    return [module for module in assigned if module not in (model.arch.embedding, model.arch.head)]


def rounded_tables(
    model: Model, assigned: Mapping[str, Scheme], context: PassContext
) -> tuple[dict[str, Weight], dict[str, LinearFacts]]:
    """Embedding and head, where they are assigned, rounded to nearest and kept; and their errors."""
    weights: dict[str, Weight] = {}
    facts: dict[str, LinearFacts] = {}
    inside = set(layer_modules(model, assigned))
    for module, scheme in assigned.items():
        if module not in inside:
            name = model.weight_of(module)
            rounded, error = round_weight(name, model.weights[name], scheme)
            weights |= context.keep({name: rounded})
            facts[module] = {"errors": error}
    return weights, facts


def unreached(model: Model, module: str, scheme: Scheme, largest: Tensor) -> tuple[QuantWeight, LinearFacts]:
    """A linear that no token activates, rounded to nearest; ``quantize_layers`` tells it.

    Args:
        model: With its weight.
        module: Its name.
        scheme: To what it is rounded.
        largest: Magnitudes that its inputs reach, float32 ``[in]``.
    """
    name = model.weight_of(module)
    rounded, error = round_weight(name, model.weights[name], scheme, largest)
    return rounded, {"errors": error, "unreached": True}


def record_facts(context: PassContext, facts: Mapping[str, LinearFacts], names: Iterable[str]) -> None:
    """Put each of the named facts into the pass record, by module."""
    for fact in names:
        context.detail(fact, {module: found[fact] for module, found in facts.items() if fact in found})
