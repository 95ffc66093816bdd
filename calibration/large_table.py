"""Embedding and head with a table that is too large to hold as floats: they read it a few rows at a time."""

from collections.abc import Iterator
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmopt.optimizer.model import DenseWeight, Weight

__all__ = ["is_large", "look_up_rows", "multiply_by_blocks"]

_LARGE_BYTES = 256 << 20


def is_large(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether a table in ``dtype`` is beyond what may lie in memory beside other things."""
    return torch.Size(weight.shape).numel() * dtype.itemsize > _LARGE_BYTES


def look_up_rows(embedding: nn.Embedding, weight: Weight, dtype: torch.dtype) -> None:
    """Have ``embedding`` read the rows of ``weight`` that it is asked for, each time, and no others.

    Its class's own function runs on a small table of these rows, since some families scale what they look up.
    """

    def forward(module: nn.Embedding, ids: Tensor) -> Tensor:
        named, numbers = torch.unique(ids, return_inverse=True)
        whole = module.weight
        module.weight = nn.Parameter(_rows(weight, named, dtype), requires_grad=False)
        try:
            found: Tensor = type(module).forward(module, numbers)
            return found
        finally:
            module.weight = whole

    embedding.padding_idx = None  # only counts in training, and may be no row of the small table
    embedding.forward = MethodType(forward, embedding)  # type: ignore[method-assign]


def multiply_by_blocks(head: nn.Linear, weight: Weight, dtype: torch.dtype) -> None:
    """Have ``head`` multiply by some rows of ``weight`` after others; its bias stays the module's own."""

    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        products, first = x.new_empty(*x.shape[:-1], weight.shape[0]), 0
        for block in _blocks(weight):
            products[..., first : first + len(block)] = functional.linear(x, block.to(dtype))
            first += len(block)
        return products if module.bias is None else products.add_(module.bias)

    head.forward = MethodType(forward, head)  # type: ignore[method-assign]


def _rows(weight: Weight, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of ``indices``, ascending, in their order."""
    found, first = [], 0
    for block in _blocks(weight):
        here = indices[(indices >= first) & (indices < first + len(block))] - first
        found.append(block[here].to(dtype))
        first += len(block)
    return torch.cat(found)


def _blocks(weight: Weight) -> Iterator[Tensor]:
    return weight.blocks() if isinstance(weight, DenseWeight) else weight.dense_blocks()
