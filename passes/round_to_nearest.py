"""Round-to-nearest integer weights: the baseline that every cleverer quantizer must beat."""

from llmopt.optimizer.assignment import SchemeQuantPass
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import Model, Weight
from llmopt.optimizer.rounding import quantize

__all__ = ["RoundToNearest"]


class RoundToNearest(SchemeQuantPass):
    """Quantize the linears without looking at data: each scale comes from the weights it covers."""

    def run(self, model: Model, context: PassContext) -> Model:
        """See ``WeightPass.run``. Records the relative error of every module's weight."""
        assigned = self.assign(model)
        changed: dict[str, Weight] = {}
        errors: dict[str, float] = {}
        for done, (module, scheme) in enumerate(assigned.items(), start=1):
            name = model.weight_of(module)
            weight = model.weights[name].dense()
            if not weight.isfinite().all():
                text = f"{name} has values that are not finite"
                raise PassError(text, hint="the checkpoint is damaged, or overflowed while it was trained or merged")
            rounded = quantize(weight, scheme)
            errors[module] = float((rounded.dense() - weight).norm() / weight.norm().clamp(min=1e-30))
            changed |= context.keep({name: rounded})
            context.progress(done, len(assigned))
        context.detail("errors", errors)
        return model.with_weights(changed) if changed else model
