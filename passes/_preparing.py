"""What the passes that prepare a model for quantization share."""

from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import Model, QuantWeight

__all__ = ["refuse_quantized"]


def refuse_quantized(model: Model, pass_name: str) -> None:
    """Refuse a model of which something is quantized.

    Raises:
        PassError: Naming the first such weight.
    """
    for name, weight in model.weights.items():
        if isinstance(weight, QuantWeight):
            raise PassError(
                f"{name} is already quantized to {weight.scheme.name}",
                hint=f"put {pass_name} before the quantizing pass",
            )
