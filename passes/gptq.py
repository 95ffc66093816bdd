"""GPTQ: rounds each weight column so that later columns make up for its error on the calibration text."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmopt.calibration.clipping import Clipping, chosen_grid
from llmopt.calibration.hessian import Moments, TokenWeighting
from llmopt.calibration.quantize_layers import LinearFacts, Plan, Stage, observed_moments, quantize_layers
from llmopt.calibration.sweep import SingularHessianError, corrected, inverse_factor, output_error, sweep
from llmopt.optimizer.assignment import SchemeQuantPass
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import Model, QuantTensors, QuantWeight, Weight
from llmopt.optimizer.rounding import quantize, with_input_scale
from llmopt.optimizer.scheme import Scheme
from llmopt.optimizer.weight_rounding import finite, relative_error, round_weight

__all__ = ["Gptq"]


class Gptq(SchemeQuantPass):
    """Quantize the decoder's linears so that their outputs on calibration text change least; the head is rounded.

    Source: Frantar et al. 2022, GPTQ, arXiv:2210.17323. Not in the paper: tokens are weighted by their norm, group
    scales are fixed before the columns are ordered, and errors of the layers before are corrected (QEP).
    """

    needs_calibration: ClassVar[bool] = True
    chooses_input_scales = "layers"

    token_weighting: TokenWeighting = Field(
        "unit_norm",
        description="How much a token counts: none (all the same), inverse_norm, or unit_norm, which keeps the few "
        "tokens with huge activations from deciding alone.",
    )
    act_order: bool = Field(True, description="Whether columns with larger activations are rounded first.")
    damping: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Added to the Hessian's diagonal, as a share of its mean; raised where it does not suffice.",
    )
    clipping: Clipping = Field(
        "activations",
        description="How a group's range is chosen: none (all values fit), weights (least squared error), activations "
        "(least squared error, each column by its activations).",
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
        inside = [module for module in assigned if module not in (model.arch.embedding, model.arch.head)]
        plan = Plan(
            modules=inside,
            follow=self.inputs == "quantized",
            true_sequential=self.true_sequential,
            twin=self.inputs == "quantized" and self.error_propagation > 0,
        )
        linears = _Linears(self, model, assigned, context)
        weights, facts = quantize_layers(model, plan, context, linears.quantize)
        for module in (name for name in assigned if name not in inside):
            name = model.weight_of(module)
            rounded, error = round_weight(name, model.weights[name], assigned[module])
            weights |= context.keep({name: rounded})
            facts[module] = {"errors": error}
        for fact in ("errors", "output_errors", "output_errors_of_rounding", "damping"):
            context.detail(fact, {module: found[fact] for module, found in facts.items() if fact in found})
        return model.with_weights(weights) if weights else model


class _Linears:
    """Quantizes the linears of a stage."""

    def __init__(self, options: Gptq, model: Model, assigned: Mapping[str, Scheme], context: PassContext) -> None:
        self._options = options
        self._model = model
        self._assigned = assigned
        self._context = context

    def quantize(self, stage: Stage) -> tuple[dict[str, Weight], dict[str, LinearFacts]]:
        """See ``quantize_layers``."""
        moments = observed_moments(stage, weighting=self._options.token_weighting)
        weights: dict[str, Weight] = {}
        facts: dict[str, LinearFacts] = {}
        for readers in stage.readers:
            for module in readers:
                name = self._model.weight_of(module)
                weights[name], facts[module] = self._linear(module, moments[readers[0]])
        return weights, facts

    def _linear(self, module: str, moments: Moments) -> tuple[QuantWeight, LinearFacts]:
        """One linear's weight and what is recorded about it."""
        name, scheme, options = self._model.weight_of(module), self._assigned[module], self._options
        if not moments.matrix.any():
            self._context.fallback(f"no calibration token activates {module}: it is rounded to nearest")
            rounded, error = round_weight(name, self._model.weights[name], scheme)
            tensors = with_input_scale(rounded.load(), scheme, moments.largest)
            return QuantWeight.of(tensors, scheme), {"errors": error}
        weight = finite(name, self._model.weights[name].dense())
        try:
            goal = weight
            if moments.cross is not None:
                share = options.error_propagation
                goal = corrected(weight, moments.matrix, moments.cross, damping=options.damping, share=share)
            tensors, damping = self._round(goal, moments, scheme)
        except SingularHessianError as error:
            raise PassError(
                f"the Hessian of {module} is singular even when its diagonal is doubled",
                hint="give more calibration text, or keep this module in float with overrides",
            ) from error
        plain = quantize(goal, scheme)
        facts = {
            "errors": relative_error(tensors.dense(), weight),
            "output_errors": output_error(tensors.dense() - goal, goal, moments.matrix),
            "output_errors_of_rounding": output_error(plain.dense() - goal, goal, moments.matrix),
            "damping": damping,
        }
        return QuantWeight.of(tensors, scheme), facts

    def _round(self, goal: Tensor, moments: Moments, scheme: Scheme) -> tuple[QuantTensors, float]:
        """The rounded weight and the damping it took."""
        options, importance, spec = self._options, moments.importance, scheme.weights
        scale, zero = chosen_grid(goal, spec, options.clipping, importance)
        order = importance.argsort(descending=True, stable=True) if options.act_order else torch.arange(len(importance))
        factor, damping = inverse_factor(moments.matrix[order][:, order], options.damping)
        tensors = sweep(goal, factor, scale, zero, spec, order=order)
        return with_input_scale(tensors, scheme, moments.largest), damping
