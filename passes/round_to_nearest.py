"""Round-to-nearest weights: the baseline that every cleverer quantizer must beat."""

from typing import ClassVar

import torch

from llmopt.calibration.input_maxima import input_maxima
from llmopt.optimizer.assignment import SchemeQuantPass
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.model import Model, Weight
from llmopt.optimizer.weight_rounding import round_weight

__all__ = ["RoundToNearest"]


class RoundToNearest(SchemeQuantPass):
    """Quantize the linears without looking at data: each scale comes from the weights it covers.

    A scheme whose inputs have a static scale needs text all the same: the scale covers the largest magnitude that
    enters the linear while the float model reads it.
    """

    chooses_input_scales = "all"
    for_encoders: ClassVar[bool] = True

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]  # the class alone does not know
        """Whether a scheme has static input scales."""
        return any(scheme.needs_input_scale for scheme in self.schemes().values())

    def run(self, model: Model, context: PassContext) -> Model:
        """See ``WeightPass.run``. Records the relative error of every module's weight."""
        assigned = self.assign(model)
        static = [module for module, scheme in assigned.items() if scheme.needs_input_scale]
        maxima = input_maxima(model, static, context) if static else {}
        changed: dict[str, Weight] = {}
        errors: dict[str, float] = {}
        for done, (module, scheme) in enumerate(assigned.items(), start=1):
            name = model.weight_of(module)
            largest = torch.tensor(maxima[module]) if module in maxima else None
            rounded, errors[module] = round_weight(name, model.weights[name], scheme, largest)
            changed |= context.keep({name: rounded})
            context.progress(done, len(assigned))
        context.detail("errors", errors)
        if maxima:
            context.detail("input_maxima", maxima)
        return model.with_weights(changed) if changed else model
