"""AWQ's search: how far to move each channel's scale into the weights, so that rounding them disturbs outputs least."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt.optimizer.rounding import quantize
from llmopt.optimizer.scheme import Scheme

__all__ = ["Consumer", "Search", "best_scale"]

_EXPONENTS = tuple(step / 20 for step in range(1, 20))


@dataclass(frozen=True, slots=True)
class Consumer:
    """A linear that reads scaled channels and is rounded.

    Attributes:
        weight: float32 ``[out, in]``.
        second_moments: Of its input, float32 ``[in, in]``.
        scheme: What it is rounded to.
    """

    weight: Tensor
    second_moments: Tensor
    scheme: Scheme

    def loss(self, columns: Tensor) -> float:
        """The squared output error, summed over outputs and tokens, when its columns are multiplied by ``columns`` and
        its inputs divided by them, before the weight is rounded.
        """
        rounded = quantize(self.weight * columns, self.scheme).dense() / columns
        difference = rounded - self.weight
        return float(((difference @ self.second_moments) * difference).sum(dtype=torch.float64))


@dataclass(frozen=True, slots=True)
class Search:
    """What was found.

    Attributes:
        scale: float32 ``[channels]``.
        loss: Squared output error of all consumers with it.
        before: The same without any scale.
    """

    scale: Tensor
    loss: float
    before: float


def best_scale(
    consumers: Sequence[Consumer],
    activations: Tensor,
    weights: Tensor,
    *,
    columns: Callable[[Tensor], Tensor] = lambda scale: scale,
) -> Search:
    """Try scales between none and one that makes all channels equally large, and take the best.

    Source: Lin et al. 2023, AWQ, arXiv:2306.00978, section 3.2: ``s = a^p`` for p in 0..1; and ``s = a^p / w^(1-p)`` as
    its code has it. We differ in the loss: that of each linear, computed from the moments of its input instead of by
    running the block again, with tokens weighted as the moments are.

    Args:
        consumers: The linears that are rounded.
        activations: a, how large each channel is, float32 ``[channels]``.
        weights: w, how large the consumers' weights of each channel are, float32 ``[channels]``.
        columns: The scale of each of the consumers' columns, ``[in]``, from that of each channel.

    Returns:
        The scale with the smallest loss, ones if no other is better.
    """

    def loss(scale: Tensor) -> float:
        return sum(consumer.loss(columns(scale)) for consumer in consumers)

    ones = torch.ones_like(activations)
    before = smallest = loss(ones)
    best = ones
    for scale in _candidates(activations, weights):
        found = loss(scale)
        if found < smallest:
            best, smallest = scale, found
    return Search(best, smallest, before)


def _candidates(activations: Tensor, weights: Tensor) -> Iterator[Tensor]:
    a, w = (each.clamp(min=1e-4 * float(each.max()) + 1e-30) for each in (activations, weights))
    for exponent in _EXPONENTS:
        for scale in (a**exponent, a**exponent / w ** (1 - exponent)):
            middle = (scale.max() * scale.min()).sqrt()
            yield (scale / middle).clamp(1e-4, 1e4)
