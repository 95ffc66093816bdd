"""Random scales per channel, moved between norms and linears: the same function from other numbers."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from llmopt.optimizer.basis import Basis, followed
from llmopt.optimizer.contracts import PassContext, WeightPass
from llmopt.optimizer.model import Model, Weight
from llmopt.optimizer.scale_pairs import ScalePair, head_pairs, layer_pairs, scaled, scaled_bases
from llmopt.passes._preparing import refuse_quantized

__all__ = ["Rescale"]


class Rescale(WeightPass):
    """Move a random scale per channel along every pair of a norm, a value or an up projection and what reads it.

    The model computes what it did before. Its weights no longer lie on a grid that an earlier quantization has left, as
    those of a checkpoint made from a 4-bit file do, on which rounding to that grid looks free. And a result that
    depends on how a checkpoint happens to be scaled shows by differing between seeds.
    """

    keeps_function: ClassVar[bool] = True
    records_bases: ClassVar[bool] = True

    range: float = Field(
        1.42, gt=1, le=16, description="Largest factor; factors are drawn log-uniformly between its inverse and itself."
    )

    def requires(self, model: Model) -> None:
        """See ``WeightPass.requires``."""
        refuse_quantized(model, "rescale")

    def run(self, model: Model, context: PassContext) -> Model:
        """See ``WeightPass.run``. Records how many scales of each kind were moved."""
        generator = torch.Generator().manual_seed(context.seed)
        counts: dict[str, int] = {}
        changed: dict[str, Weight] = {}
        groups = [*(layer_pairs(model, index) for index in range(model.num_layers)), head_pairs(model)]
        for done, pairs in enumerate(groups, start=1):
            weights, moved = self._rescaled(model, pairs, generator)
            changed |= context.keep(weights)
            model = model.with_bases(moved)
            for pair in pairs:
                counts[pair.kind] = counts.get(pair.kind, 0) + pair.channels
            context.progress(done, len(groups))
        context.detail("scales", counts)
        return model.with_weights(changed)

    def _rescaled(
        self, model: Model, pairs: list[ScalePair], generator: torch.Generator
    ) -> tuple[Mapping[str, Weight], Mapping[str, Basis]]:
        """The weights that change when a scale is moved along each of ``pairs``, and what happens to linears."""
        limit = math.log(self.range)
        changed: dict[str, Weight] = {}
        bases: dict[str, Basis] = {}
        for pair in pairs:
            scale = torch.empty(pair.channels).uniform_(-limit, limit, generator=generator).exp()
            changed |= scaled(model.with_weights(changed), pair, scale)
            bases = followed(bases, scaled_bases(model, pair, scale))
        return changed, bases
