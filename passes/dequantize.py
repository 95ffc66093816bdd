"""Turns a quantized model back into floats, so that other passes can work on it."""

from typing import ClassVar

from llmopt.optimizer.contracts import PassContext, WeightPass
from llmopt.optimizer.model import DenseWeight, Model, QuantWeight

__all__ = ["Dequantize"]


class Dequantize(WeightPass):
    """Replace every quantized weight by the floats that it stands for.

    What was lost when it was quantized stays lost, and inputs that its scheme rounds are no longer rounded. For
    checkpoints that exist only quantized, such as FP8 or NF4 bases, before they are rotated or quantized otherwise.
    """

    dequantizes: ClassVar[bool] = True

    def run(self, model: Model, context: PassContext) -> Model:
        """See ``WeightPass.run``."""
        quantized = [name for name, weight in model.weights.items() if isinstance(weight, QuantWeight)]
        if not quantized:
            context.note("no weight of this model was quantized")
        for done, name in enumerate(quantized):
            context.progress(done, len(quantized))
            weight = model.weights[name]
            model = model.with_weights(context.keep({name: DenseWeight.of(weight.dense())}))
        context.progress(len(quantized), len(quantized))
        return model
