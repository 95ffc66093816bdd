"""SmoothQuant: moves the spread of activations into weights, so that rounding both per token costs less."""

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from llmopt.calibration.layerwise import Layerwise
from llmopt.calibration.observe import finite_rows
from llmopt.optimizer.contracts import PassContext, WeightPass
from llmopt.optimizer.decoder import Experts, Layer
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import Model, Weight
from llmopt.optimizer.scale_pairs import ScalePair, layer_pairs, scaled, scaled_bases
from llmopt.optimizer.weight_rounding import finite
from llmopt.passes._preparing import refuse_quantized

__all__ = ["Smoothquant"]


class Smoothquant(WeightPass):
    """Divide channels whose activations are large, and multiply the weights that read them.

    The model computes what it did before. Source: Xiao et al. 2022, SmoothQuant, arXiv:2211.10438, equation 4. Not in
    the paper: values and up projections can be smoothed as well. Against the few huge channels of a residual stream
    ``rotate`` does more; smoothing is for models whose stream cannot be rotated, and for FP8.
    """

    keeps_function: ClassVar[bool] = True
    records_bases: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True

    alpha: float = Field(
        0.5, ge=0, le=1, description="Share of the activations' spread that the weights take: 0 evens out the weights."
    )
    pairs: tuple[Literal["norm", "value", "up"], ...] = Field(
        ("norm",),
        min_length=1,
        description="Which channels are smoothed: those of norms, of values before the attention's output linear, "
        "of up projections before down projections.",
    )

    def fits(self, model: Model) -> None:
        """See ``WeightPass.fits``: there are pairs of the chosen kinds."""
        if not any(self._chosen(model, index) for index in range(model.num_layers)):
            possible = sorted({pair.kind for index in range(model.num_layers) for pair in layer_pairs(model, index)})
            raise PassError(
                f"{model.decoder.name} has no channels of the kind {' or '.join(self.pairs)} that linears alone read",
                hint=f"pairs that it has: {', '.join(possible)}",
            )

    def requires(self, model: Model) -> None:
        """See ``WeightPass.requires``."""
        super().requires(model)
        refuse_quantized(model, "smoothquant")

    def run(self, model: Model, context: PassContext) -> Model:
        """See ``WeightPass.run``. Records the ratio of the largest to the smallest scale of every producer."""
        text = Layerwise.of(model, context)
        changed: dict[str, Weight] = {}
        spreads: dict[str, float] = {}
        for index, layer in enumerate(model.decoder.layers):
            pairs = self._chosen(model, index)
            largest = _largest_inputs(text, _observed(layer, pairs))
            smoothed: dict[str, Weight] = {}
            for pair in pairs:
                scale = self._scale(model.with_weights(smoothed), pair, largest)
                if scale is None:
                    context.fallback(
                        f"no calibration token reaches {pair.consumers[0]}: {pair.producer} is left as it is"
                    )
                    continue
                spreads[pair.producer] = float(scale.max() / scale.min())
                smoothed |= scaled(model.with_weights(smoothed), pair, scale)
                model = model.with_bases(scaled_bases(model, pair, scale))
            changed |= context.keep(smoothed)
            if index + 1 < model.num_layers:
                text.advance()
            context.progress(index + 1, model.num_layers)
        context.detail("spreads", spreads)
        return model.with_weights(changed)

    def _chosen(self, model: Model, index: int) -> list[ScalePair]:
        return [pair for pair in layer_pairs(model, index) if pair.kind in self.pairs]

    def _scale(self, model: Model, pair: ScalePair, largest: dict[str, Tensor]) -> Tensor | None:
        """The scale of each channel, float32 ``[channels]``; None where no token reached what reads them."""
        inputs = torch.stack([largest[name] for name in pair.consumers if name in largest]).amax(0)
        if not inputs.any():
            return None
        weights = torch.stack([_largest_weights(model, name) for name in pair.consumers]).amax(0)
        by_channel = (pair.by_channel(each).amax(0) for each in (inputs, weights))
        return smoothing_scale(*by_channel, alpha=self.alpha)


def smoothing_scale(inputs: Tensor, weights: Tensor, *, alpha: float) -> Tensor:
    """``max|X_j|^alpha / max|W_j|^(1 - alpha)``: what activations are divided by and weights multiplied with.

    Source: Xiao et al. 2022, SmoothQuant, arXiv:2211.10438, equation 4.

    Args:
        inputs: Largest magnitude of each channel's activations, float32 ``[channels]``.
        weights: The same of the weights that read it.
        alpha: The migration strength.

    Returns:
        Float32 ``[channels]``, above 0. A channel that is never active, or that no weight reads, keeps its scale: 1.
    """
    scale = inputs.pow(alpha) / weights.pow(1 - alpha)
    return torch.where((inputs > 0) & (weights > 0), scale, torch.ones_like(scale)).clamp(1e-5, 1e5)


def _observed(layer: Layer, pairs: Iterable[ScalePair]) -> list[str]:
    """Linears whose inputs are those of all consumers: one of those that read the same, and every expert's."""
    found: dict[str, None] = {}
    experts = set(layer.mlp.linears) if isinstance(layer.mlp, Experts) else set()
    for pair in pairs:
        others = [name for name in pair.consumers if name in layer.linears and name not in experts]
        gates = [name for name in pair.consumers if name in experts]
        found |= dict.fromkeys(others[:1] or gates)
    return list(found)


def _largest_inputs(text: Layerwise, modules: list[str]) -> dict[str, Tensor]:
    """Module -> the largest magnitude of each of its input columns, float32 ``[in]``, over all tokens."""
    largest: dict[str, Tensor] = {}

    def observe(module: str, rows: Tensor) -> None:
        found = finite_rows(module, rows).abs().amax(0) if len(rows) else rows.new_zeros(rows.shape[1])
        largest[module] = torch.maximum(largest[module], found) if module in largest else found

    if modules:
        text.observe(modules, observe)
    return largest


def _largest_weights(model: Model, module: str) -> Tensor:
    """The largest magnitude of each column of a linear's weight, float32 ``[in]``."""
    name = model.weight_of(module)
    return finite(name, model.weights[name].dense()).abs().amax(0)
