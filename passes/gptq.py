"""GPTQ: rounds each weight column so that later columns make up for its error on the calibration text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmopt.calibration.clipping import chosen_grid
from llmopt.calibration.hessian import Moments
from llmopt.calibration.quantize_layers import LinearFacts, Plan, Stage, observed_moments, quantize_layers
from llmopt.calibration.sweep import SingularHessianError, corrected, inverse_factor, output_error, sweep
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import Model, QuantWeight, Weight
from llmopt.optimizer.rounding import quantize, with_input_scale
from llmopt.optimizer.scheme import Scheme
from llmopt.optimizer.weight_rounding import finite, relative_error
from llmopt.passes._calibrated import CalibratedQuantPass, layer_modules, record_facts, rounded_tables, unreached

__all__ = ["Gptq"]


class Gptq(CalibratedQuantPass):
    """Quantize the decoder's linears so that their outputs on calibration text change least; the head is rounded.

    Source: Frantar et al. 2022, GPTQ, arXiv:2210.17323. Not in the paper: tokens are weighted by their norm, group
    scales are fixed before the columns are ordered, and errors of the layers before are corrected (QEP).
    """

    act_order: bool = Field(True, description="Whether columns with larger activations are rounded first.")
    damping: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Added to the Hessian's diagonal, as a share of its mean; raised where it does not suffice.",
    )
    error_propagation: float = Field(
        0.25,
        ge=0,
        le=1,
        description="Share of the earlier layers' error that a linear's weights are corrected for before rounding.",
    )
    inputs: Literal["quantized", "float"] = Field(
        "quantized", description="Where a layer's inputs come from: the quantized layers before it, or the float model."
    )
    true_sequential: bool = Field(
        False, description="Whether within a layer, too, a linear sees the quantized ones before it."
    )

    @model_validator(mode="after")
    def _errors_come_from_quantized_layers(self) -> "Gptq":
        if self.inputs == "float" and "error_propagation" in self.model_fields_set and self.error_propagation:
            raise ValueError("error_propagation goes with inputs: quantized; in the float model there are no errors")
        return self

    def run(self, model: Model, context: PassContext) -> Model:
        """See ``WeightPass.run``. Records each linear's error, that of its outputs, and that of plain rounding."""
        assigned = self.assign(model)
        plan = Plan(
            modules=layer_modules(model, assigned),
            follow=self.inputs == "quantized",
            true_sequential=self.true_sequential,
            twin=self.inputs == "quantized" and self.error_propagation > 0,
            divisible=True,
        )
        linears = _Linears(self, model, assigned)
        weights, facts = quantize_layers(model, plan, context, linears.quantize)
        tables, errors = rounded_tables(model, assigned, context)
        weights |= tables
        record_facts(context, facts | errors, ("errors", "output_errors", "output_errors_of_rounding", "damping"))
        return model.with_weights(weights) if weights else model


@dataclass(frozen=True, slots=True)
class _Order:
    """In which order columns are rounded: a permutation, and for it the factor of the inverse and its damping."""

    columns: Tensor
    factor: Tensor
    damping: float


class _Linears:
    """Quantizes the linears of a stage."""

    def __init__(self, options: Gptq, model: Model, assigned: Mapping[str, Scheme]) -> None:
        self._options = options
        self._model = model
        self._assigned = assigned

    def quantize(self, stage: Stage) -> tuple[dict[str, Weight], dict[str, LinearFacts]]:
        """See ``quantize_layers``."""
        moments = observed_moments(stage, weighting=self._options.token_weighting)
        weights: dict[str, Weight] = {}
        facts: dict[str, LinearFacts] = {}
        for readers in stage.readers:
            inputs = moments[readers[0]]
            order = self._order(readers[0], inputs)
            for module in readers:
                weights[self._model.weight_of(module)], facts[module] = self._linear(module, inputs, order)
        return weights, facts

    def _order(self, module: str, moments: Moments) -> _Order | None:
        """The order of the columns for all that read what ``module`` does; None where no token activates them."""
        if not moments.importance.any():
            return None
        importance, options = moments.importance, self._options
        columns = (
            importance.argsort(descending=True, stable=True) if options.act_order else torch.arange(len(importance))
        )
        try:
            factor, damping = inverse_factor(moments.matrix[columns][:, columns], options.damping)
        except SingularHessianError as error:
            raise _singular(module) from error
        return _Order(columns, factor, damping)

    def _linear(self, module: str, moments: Moments, order: _Order | None) -> tuple[QuantWeight, LinearFacts]:
        """One linear's weight and what is recorded about it."""
        name, scheme, options = self._model.weight_of(module), self._assigned[module], self._options
        if order is None:
            return unreached(self._model, module, scheme, moments.largest)
        weight = goal = finite(name, self._model.weights[name].dense())
        if moments.cross is not None:
            share = options.error_propagation
            goal = corrected(weight, moments.cross, order.factor, order=order.columns, share=share)
        scale, zero = chosen_grid(goal, scheme.weights, options.clipping, moments.importance)
        tensors = sweep(goal, order.factor, scale, zero, scheme.weights, order=order.columns)
        tensors = with_input_scale(tensors, scheme, moments.largest)
        plain = quantize(goal, scheme)
        facts = {
            "errors": relative_error(tensors.dense(), weight),
            "output_errors": output_error(tensors.dense() - goal, goal, moments.matrix),
            "output_errors_of_rounding": output_error(plain.dense() - goal, goal, moments.matrix),
            "damping": order.damping,
        }
        return QuantWeight.of(tensors, scheme), facts


def _singular(module: str) -> PassError:
    return PassError(
        f"the Hessian of {module} cannot be factorized even when its diagonal is doubled: what enters is so large that "
        "its squares overflow",
        hint="the checkpoint is damaged, or overrides keep this module in float",
    )
