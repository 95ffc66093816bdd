"""Round-to-nearest weights: the baseline that every cleverer quantizer must beat."""

from llmopt.optimizer.assignment import SchemeQuantPass
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.model import Model, Weight
from llmopt.optimizer.weight_rounding import round_weight

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
            rounded, errors[module] = round_weight(name, model.weights[name], scheme)
            changed |= context.keep({name: rounded})
            context.progress(done, len(assigned))
        context.detail("errors", errors)
        return model.with_weights(changed) if changed else model
