"""AWQ: moves scales into channels with large activations before rounding, and narrows each group's range."""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from llmopt.calibration.clipping import chosen_grid
from llmopt.calibration.quantize_layers import LinearFacts, Plan, Stage, observed_moments, quantize_layers
from llmopt.calibration.scale_search import Consumer, best_scale
from llmopt.calibration.sweep import output_error
from llmopt.optimizer.basis import Basis, followed
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.model import Model, QuantWeight, Weight
from llmopt.optimizer.rounding import quantize_on, with_input_scale
from llmopt.optimizer.scale_pairs import ScalePair, layer_pairs, scaled, scaled_bases
from llmopt.optimizer.scheme import Scheme
from llmopt.optimizer.weight_rounding import finite, relative_error
from llmopt.passes._calibrated import CalibratedQuantPass, layer_modules, record_facts, rounded_tables, unreached
from llmopt.passes._preparing import refuse_quantized_cache

__all__ = ["Awq"]


class Awq(CalibratedQuantPass):
    """Quantize the decoder's linears with scales and ranges chosen so that their outputs change least.

    Source: Lin et al. 2023, AWQ, arXiv:2306.00978. Not in the paper: errors are those of each linear's own outputs,
    from the moments of its inputs, with tokens weighted by their norm; and how active a channel is, is its root mean
    square, which the same moments hold, where the paper takes the mean magnitude.
    """

    scaling: bool = Field(True, description="Whether scales are searched; false leaves the search of ranges.")
    rounds: bool = Field(
        True,
        description="Whether weights are rounded; false leaves scaled weights in float, for another quantizer behind.",
    )

    @property
    def leaves_floats(self) -> bool:
        """See ``QuantPass.leaves_floats``."""
        return not self.rounds

    @property
    def records_bases(self) -> bool:  # type: ignore[override]  # the class alone does not know
        """Whether weights are scaled and not rounded."""
        return not self.rounds

    def requires(self, model: Model) -> None:
        """See ``WeightPass.requires``."""
        super().requires(model)
        if self.scaling:
            refuse_quantized_cache(model, "awq")

    def run(self, model: Model, context: PassContext) -> Model:
        """See ``WeightPass.run``. Records each linear's error, that of its outputs, and what the scales gained."""
        assigned = self.assign(model)
        layers = _Layers(self, model, assigned)
        plan = Plan(modules=layer_modules(model, assigned), follow=self.rounds, true_sequential=False)
        weights, facts = quantize_layers(model, plan, context, layers.quantize)
        if self.rounds:
            tables, errors = rounded_tables(model, assigned, context)
            weights |= tables
            facts |= errors
        record_facts(context, facts, ("errors", "output_errors", "scaling"))
        return _with_moved_scales(model, facts).with_weights(weights) if weights else model


class _Layers:
    """Quantizes the linears of a decoder layer."""

    def __init__(self, options: Awq, model: Model, assigned: Mapping[str, Scheme]) -> None:
        self._options = options
        self._model = model
        self._assigned = assigned

    def quantize(self, stage: Stage) -> tuple[dict[str, Weight], dict[str, LinearFacts]]:
        """See ``quantize_layers``: a stage is a layer."""
        by_reader = observed_moments(stage, weighting=self._options.token_weighting)
        moments: dict[str, Tensor] = {}
        largest: dict[str, Tensor] = {}
        for readers in stage.readers:
            found = by_reader.pop(readers[0])
            moments |= dict.fromkeys(readers, found.matrix.to(torch.float32))
            largest |= dict.fromkeys(readers, found.largest)
        weights: dict[str, Weight] = {}
        facts: dict[str, LinearFacts] = {}
        model = self._model
        for pair in layer_pairs(model, stage.index) if self._options.scaling else ():
            if moments.keys().isdisjoint(pair.consumers):
                continue
            scale, facts[pair.producer] = self._scale(model, pair, moments)
            if scale is not None:
                facts[pair.producer]["scales"] = scale.tolist()
                weights |= scaled(model, pair, scale)
                model = model.with_weights(weights)
                columns = pair.columns(scale)
                for readers in stage.readers:
                    if moved := [module for module in readers if module in pair.consumers]:
                        matrix = moments[moved[0]] / columns / columns[:, None]
                        moments |= dict.fromkeys(moved, matrix)
                        largest |= dict.fromkeys(moved, largest[moved[0]] / columns)
        for module, matrix in moments.items():
            if self._options.rounds:
                name = model.weight_of(module)
                weights[name], rounding = self._round(model, module, matrix, largest[module])
                facts[module] = facts.get(module, {}) | rounding
        return weights, facts

    def _scale(self, model: Model, pair: ScalePair, moments: Mapping[str, Tensor]) -> tuple[Tensor | None, LinearFacts]:
        """The best scale of a pair, None if that is no scale at all, and what it gained."""
        consumers = [
            Consumer(_dense(model, module), moments[module], self._assigned[module])
            for module in pair.consumers
            if module in moments
        ]
        diagonals = torch.stack([consumer.second_moments.diagonal() for consumer in consumers])
        activations = pair.by_channel(diagonals).mean(dim=(0, -2)).sqrt()
        magnitudes = torch.cat([consumer.weight.abs() for consumer in consumers])
        weights = pair.by_channel(magnitudes.mean(dim=0)).mean(dim=-2)
        found = best_scale(consumers, activations, weights, columns=pair.columns)
        gained = {"scaling": found.loss / found.before if found.before > 0 else 1.0}
        return (found.scale if found.loss < found.before else None), gained

    def _round(self, model: Model, module: str, matrix: Tensor, largest: Tensor) -> tuple[QuantWeight, LinearFacts]:
        """A linear's rounded weight and what is recorded about it."""
        scheme = self._assigned[module]
        if not matrix.diagonal().any():
            return unreached(model, module, scheme, largest)
        weight = _dense(model, module)
        grids = chosen_grid(weight, scheme.weights, self._options.clipping, matrix.diagonal())
        tensors = quantize_on(weight, *grids, scheme)
        difference = tensors.dense() - weight
        facts = {
            "errors": relative_error(tensors.dense(), weight),
            "output_errors": output_error(difference, weight, matrix),
        }
        return QuantWeight.of(with_input_scale(tensors, scheme, largest), scheme), facts


def _with_moved_scales(model: Model, facts: Mapping[str, LinearFacts]) -> Model:
    """The model with what happened to its linears; of layers, too, that were finished before a build was killed."""
    for index in range(model.num_layers):
        bases: dict[str, Basis] = {}
        for pair in layer_pairs(model, index):
            if (scales := facts.get(pair.producer, {}).get("scales")) is not None:
                bases = followed(bases, scaled_bases(model, pair, torch.tensor(scales)))
        model = model.with_bases(bases)
    return model


def _dense(model: Model, module: str) -> Tensor:
    name = model.weight_of(module)
    return finite(name, model.weights[name].dense())
