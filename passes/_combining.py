"""Several changes of one weight made into one."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Combination", "Method", "Sign"]

Method = Literal["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]
Sign = Literal["total", "frequency"]


@dataclass(frozen=True, slots=True)
class Combination:
    """How changes of a weight are combined. The words are PEFT's; each works on the changes themselves, not on factors.

    Source: Yadav et al. 2023, TIES-Merging, arXiv:2306.01708, section 3; Yu et al. 2023, DARE, arXiv:2311.03099,
    equations 2 and 3. As in PEFT, signs are elected before weights are applied, and sums are divided by the number of
    changes that agree.

    Attributes:
        method: linear adds them; magnitude_prune and ties keep the largest elements of each, the dare methods random
            ones, which are divided by their share; the ties methods add only what has the elected sign.
        density: The share of elements that are kept.
        sign: Whether the sign of the sum is elected, or that of the most.
        seed: Of what is kept at random.
    """

    method: Method = "linear"
    density: float = 1.0
    sign: Sign = "total"
    seed: int = 0

    def of(self, name: str, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The combined change of the weight called ``name``.

        Args:
            name: What is kept at random depends on it, and not on which other weights are changed.
            changes: Float32, of one shape.
            weights: Of each.
        """
        kept = [self._kept(change, f"{name} {number}") for number, change in enumerate(changes)]
        weighted = [change * weight for change, weight in zip(kept, weights, strict=True)]
        if self.method not in ("ties", "dare_ties"):
            return torch.stack(weighted).sum(0) if len(weighted) > 1 else weighted[0]
        stacked = torch.stack(kept)
        votes = stacked if self.sign == "total" else stacked.sign()
        agrees = stacked.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
        return (torch.stack(weighted) * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    def _kept(self, change: Tensor, name: str) -> Tensor:
        if self.method == "linear" or self.density == 1:
            return change
        if self.method in ("magnitude_prune", "ties"):
            kept = torch.zeros(change.numel())
            kept[change.abs().flatten().topk(int(self.density * change.numel())).indices] = 1
            return change * kept.reshape(change.shape)
        number = int.from_bytes(sha256(f"{self.seed} {name}".encode()).digest()[:7], "little")
        drawn = torch.rand(change.shape, generator=torch.Generator().manual_seed(number))
        return change * (drawn < self.density) / self.density
