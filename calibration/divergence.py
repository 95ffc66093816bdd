"""How far two distributions over the next token are apart."""

import torch
from torch import Tensor

__all__ = ["kl_divergence"]


def kl_divergence(source: Tensor, engine: Tensor) -> Tensor:
    """KL(source || engine) of each row in nats, float64 ``[rows]``, for logits float32 ``[rows, vocab]``.

    As ``sum p (a - b) - (lse(a) - lse(b))``: equal logits give exactly 0, and small differences are not lost in the
    rounding of two large log probabilities.
    """
    source = source - source.amax(-1, keepdim=True)
    engine = engine - engine.amax(-1, keepdim=True)
    shift = source.logsumexp(-1).double() - engine.logsumexp(-1).double()
    return (source.softmax(-1) * (source - engine)).sum(-1, dtype=torch.float64) - shift
