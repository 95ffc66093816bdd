"""How far two models' predictions are apart, as sums that grow with every block of rows."""

import math
from dataclasses import dataclass

from torch import Tensor

from llmopt.calibration.divergence import kl_divergence

__all__ = ["Distance", "negative_log_likelihood"]

_ROWS = 16
"""Positions at a time: a step needs several copies of their logits, 8 MB each for a vocabulary of 128,000."""


@dataclass(slots=True)
class Distance:
    """Sums over positions; float64.

    Attributes:
        positions: Predictions compared.
        kl: Sum of KL(source || engine), in nats.
        agreements: Positions at which both have the same most likely token.
        targets: Positions whose next token is known.
        source_nll: Sum of the source's negative log likelihood of those next tokens, in nats.
        engine_nll: The engine's.
        largest: Largest absolute difference of two logits.
    """

    positions: int = 0
    kl: float = 0.0
    agreements: int = 0
    targets: int = 0
    source_nll: float = 0.0
    engine_nll: float = 0.0
    largest: float = 0.0

    def add(self, source: Tensor, engine: Tensor, next_ids: Tensor) -> None:
        """Count the positions of one block.

        Args:
            source: Logits, float32 ``[rows, vocab]``.
            engine: Logits, float32 ``[rows, vocab]``.
            next_ids: The tokens that follow, int64 ``[known]``, for the first ``known`` rows.
        """
        for first in range(0, len(source), _ROWS):
            rows = slice(first, first + _ROWS)
            self._add(source[rows], engine[rows], next_ids[rows])

    def _add(self, source: Tensor, engine: Tensor, next_ids: Tensor) -> None:
        self.positions += len(source)
        self.largest = max(self.largest, float((source - engine).abs().max()))
        self.agreements += int((source.argmax(-1) == engine.argmax(-1)).sum())
        self.kl += float(kl_divergence(source, engine).sum())
        known = len(next_ids)
        self.targets += known
        self.source_nll += float(negative_log_likelihood(source[:known], next_ids).sum())
        self.engine_nll += float(negative_log_likelihood(engine[:known], next_ids).sum())

    @property
    def mean_kl(self) -> float:
        """Nats per token. Rounding may leave the sum of two equal models a little below 0; this is 0 then."""
        return max(0.0, self.kl / self.positions)

    @property
    def top1(self) -> float:
        """Share of positions with the same most likely token."""
        return self.agreements / self.positions

    @property
    def perplexities(self) -> tuple[float, float]:
        """Of the engine and of the source: the exponential of the mean negative log likelihood."""
        return math.exp(self.engine_nll / self.targets), math.exp(self.source_nll / self.targets)


def negative_log_likelihood(logits: Tensor, ids: Tensor) -> Tensor:
    """``-log softmax(logits)[ids]`` in nats, float64 ``[rows]``, for logits float32 ``[rows, vocab]``."""
    logits = logits - logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, ids[:, None])[:, 0]
    return logits.logsumexp(-1).double() - chosen.double()
