"""transformers' module of an encoder, and the pooling behind it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.optimizer.pooling import Pooling

__all__ = ["encoder_module", "pooled"]

_SMALLEST = 1e-12
"""What a vector's length is at least, as in sentence-transformers: a vector of zeros stays one."""


def encoder_module(config: Mapping[str, Any], *, device: str = "cpu", attention: str = "eager") -> nn.Module:
    """The encoder without what stands behind it, its parameters not initialized.

    Args:
        config: Completed, as ``hf_config.complete`` returns it.
        device: Where its parameters are; on the meta device its tables are there too.
        attention: transformers' name of the attention's implementation.

    Raises:
        ValueError, TypeError, KeyError, RuntimeError, ArithmeticError, AssertionError: As transformers refuses it.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.initialization import no_init_weights

    settings = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    made = AutoConfig.for_model(config["model_type"], **settings)
    with torch.device(device), no_init_weights():
        network: Any = AutoModel.from_config(made, dtype=torch.float32, attn_implementation=attention)
    if getattr(network, "pooler", None) is not None:
        network.pooler = None
    network.eval().requires_grad_(False)
    module: nn.Module = network
    return module


def pooled(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector of each text, float32 ``[n, d]``.

    Args:
        hidden: The vectors of its tokens, float32 ``[n, t, d]``.
        mask: int64 ``[n, t]``, 1 where there is a token and 0 where there is padding.
        pooling: How.
    """
    vector = _POOLED[pooling.mode](hidden, mask)
    if not pooling.normalize:
        return vector
    length: Tensor = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    return vector / length.clamp(min=_SMALLEST)


def _sum(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the tokens' vectors, ``[n, d]``, and their number, ``[n, 1]``, at least 1."""
    weight = mask.to(hidden.dtype).unsqueeze(1)
    return (weight @ hidden).squeeze(1), weight.sum(2).clamp(min=1)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    total, count = _sum(hidden, mask)
    return total / count


def _mean_sqrt(hidden: Tensor, mask: Tensor) -> Tensor:
    total, count = _sum(hidden, mask)
    return total / count.sqrt()


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.unsqueeze(2) > 0, hidden, torch.finfo(hidden.dtype).min).amax(1)


def _cls(hidden: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG001 - as the others
    return hidden[:, 0]


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    positions = torch.arange(mask.shape[1]) * mask
    return hidden.gather(1, positions.amax(1).reshape(-1, 1, 1).expand(-1, 1, hidden.shape[2])).squeeze(1)


_POOLED = {"mean": _mean, "mean_sqrt_len_tokens": _mean_sqrt, "max": _max, "cls": _cls, "lasttoken": _last}
