"""What the passes that prepare a model for quantization share."""

from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import Model, QuantWeight

__all__ = ["refuse_quantized", "refuse_quantized_cache"]


def refuse_quantized(model: Model, pass_name: str) -> None:
    """Refuse a model of which something is quantized, or its cache.

    Raises:
        PassError: Naming the first such weight.
    """
    refuse_quantized_cache(model, pass_name)
    for name, weight in model.weights.items():
        if isinstance(weight, QuantWeight):
            raise PassError(
                f"{name} is already quantized to {weight.scheme.name}",
                hint=f"put {pass_name} before the quantizing pass, or dequantize before both",
            )


def refuse_quantized_cache(model: Model, pass_name: str) -> None:
    """Refuse a model whose cache has scales already: they fit keys and values as they are.

    Raises:
        PassError: See above.
    """
    if model.cache_scales(0) is not None:
        raise PassError(
            "the cache is already quantized, on scales that fit keys and values as they are",
            hint=f"put {pass_name} before kv_cache",
        )
