"""Checks that a weight pass which claims to keep the function does: the model before it against the one behind it.

A pass may change what travels between layers, as a rotation of the residual stream does, so hidden states cannot be
compared. The logits of a model of one layer can: embedding, that decoder layer, final norm and head. A wrong layer is
seen and named, and no more than one layer of each model is in memory.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from llmopt.calibration.reference import Reference
from llmopt.optimizer.decoder import Experts, Layer
from llmopt.optimizer.errors import VerificationError
from llmopt.optimizer.model import Model
from llmopt.optimizer.weight_rounding import refuse_damaged

__all__ = ["LIMIT", "relative_difference", "verify_same_function"]

LIMIT = 1e-4
"""Accepted ``rms(difference) / std(logits)`` of a token. Float32 sums in another order stay below 1e-5."""

_SEQUENCES, _TOKENS = 2, 12


def verify_same_function(
    name: str, before: Model, after: Model, *, level: Literal["quick", "full"], seed: int
) -> dict[str, float]:
    """Compare two models layer by layer on random tokens.

    Args:
        name: The pass between them, for messages.
        before: What it was given.
        after: What it made.
        level: quick: the first, a middle and the last layer, and the first of every other kind; full: every layer.
        seed: Of the tokens.

    Returns:
        ``embedding and head``, which is the model without layers, and each layer's name -> the largest difference of a
        token's logits, as a share of their spread.

    Raises:
        PassError: A weight of ``before`` has values that are not finite.
        VerificationError: A difference is above ``LIMIT``, or not a number.
    """
    layers = before.decoder.layers
    chosen = range(len(layers)) if level == "full" else _quick(layers)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(before.decoder.vocab_size, (_SEQUENCES, _TOKENS), generator=generator)
    names = ["embedding and head", *(layers[i].name for i in chosen)]
    references = [Reference(model) for model in (before, after)]
    entering_head = [_entering_head(reference, ids, chosen) for reference in references]
    found: dict[str, float] = {}
    for part, *hidden in zip(names, *entering_head, strict=True):
        expected, computed = (reference.head(each) for reference, each in zip(references, hidden, strict=True))
        difference = relative_difference(computed, expected)
        if math.isnan(difference):
            refuse_damaged(before)
        if not difference <= LIMIT:
            raise VerificationError(
                f"{name} changes what the model computes: {part}: logits differ by {difference:.2g} of their spread, "
                f"{LIMIT:g} is accepted (seed {seed})",
                hint="this is a bug in that pass; verify: none builds all the same",
            )
        found[part] = float(f"{difference:.3g}")
    return found


def relative_difference(computed: Tensor, expected: Tensor) -> float:
    """The largest of all tokens' ``rms(difference) / std(expected)``, for logits ``[..., vocab]``."""
    difference = (computed - expected).square().mean(-1).sqrt() / expected.std(-1)
    return math.nan if difference.isnan().any() else float(difference.max())


def _entering_head(reference: Reference, ids: Tensor, chosen: range | list[int]) -> list[Tensor]:
    """What would enter the final norm in models without layers, and with one of the chosen layers each."""
    embedded = reference.embed(ids)
    return [embedded, *(reference.layer(i, embedded) for i in chosen)]


def _quick(layers: tuple[Layer, ...]) -> list[int]:
    """The first, a middle and the last layer, and the first of each kind that is computed in another way."""
    kinds = [(layer.attention.window, str(layer.attention.rope), isinstance(layer.mlp, Experts)) for layer in layers]
    chosen = {0, len(layers) // 2, len(layers) - 1}
    return sorted(chosen | {kinds.index(kind) for kind in set(kinds) - {kinds[i] for i in chosen}})
