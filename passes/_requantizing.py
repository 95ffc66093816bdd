"""A quantized weight that was changed in float: rounded again to its own scheme, and what that costs."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from llmopt.calibration.clipping import Clipping, chosen_grid
from llmopt.optimizer.assignment import Override
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.model import DenseWeight, Model, QuantTensors, QuantWeight, Weight
from llmopt.optimizer.rounding import quantize_on
from llmopt.optimizer.weight_rounding import relative_error
from llmopt.passes.awq import Awq
from llmopt.passes.gptq import Gptq

__all__ = ["Requantizer", "cost_of", "linear_of", "requantized", "with_calibration"]

Requantizer = Literal["round_to_nearest", "gptq", "awq"]


def requantized(base: QuantWeight, merged: Tensor) -> QuantWeight:
    """``merged``, float32 ``[out, in]``, to the nearest numbers of ``base``'s scheme.

    Each group gets the base's own range or one that is chosen anew, whichever loses less. A small change is lost on the
    base's grid, where most elements go back to where they were; but on another one the base is rounded a second time,
    which can cost more than the adapter is worth. Columns stay in their groups, and a scale of inputs stays as it is.
    """
    tensors, order = base.load().by_group()
    ordered = merged if order is None else merged[:, order]
    # Of 8 bits other ranges gain nothing: on SmolLM2 errors agree in two digits.
    clipping: Clipping = "weights" if base.scheme.weights.num_bits < 8 else "none"
    anew = quantize_on(ordered, *chosen_grid(ordered, base.scheme.weights, clipping, None), base.scheme)
    found = _better(quantize_on(ordered, tensors.scale, tensors.zero, base.scheme), anew, ordered)
    if order is not None:
        values = torch.empty_like(found.values)
        values[:, order] = found.values
        found = found._replace(values=values, group_index=base.load().group_index)
    return QuantWeight.of(found._replace(input_scale=tensors.input_scale), base.scheme)


def _better(one: QuantTensors, other: QuantTensors, exact: Tensor) -> QuantTensors:
    """Of each group the one that is nearer to ``exact``; of a weight whose rows share scales, of all of it."""
    errors = [(each.dense() - exact).square() for each in (one, other)]
    if one.block is not None or len(one.scale) < len(exact):
        return one if errors[0].sum() <= errors[1].sum() else other
    rows, groups = one.scale.shape
    is_first = torch.le(*(error.reshape(rows, groups, -1).sum(-1) for error in errors))
    each = is_first.repeat_interleave(exact.shape[1] // groups, dim=1)
    zero = None if one.zero is None or other.zero is None else torch.where(is_first, one.zero, other.zero)
    return QuantTensors(
        torch.where(each, one.values, other.values), torch.where(is_first, one.scale, other.scale), zero
    )


def with_calibration(
    model: Model, merged: Mapping[str, DenseWeight], method: Literal["gptq", "awq"], context: PassContext
) -> Mapping[str, Weight]:
    """The weights in ``merged``, rounded again by GPTQ, or AWQ's ranges, each to the scheme it has in ``model``.

    AWQ moves no scales here: the base's are where they were moved to when it was quantized, or not at all.
    """
    modules = {linear_of(model, name): model.weights[name] for name in merged}
    schemes = {module: weight.scheme for module, weight in modules.items() if isinstance(weight, QuantWeight)}
    options = {
        "scheme": next(iter(schemes.values())),
        "embedding": schemes.get(model.arch.embedding, "none"),
        "overrides": (
            *(Override(match=module, scheme=scheme) for module, scheme in schemes.items()),
            Override(match="re:", scheme="none"),
        ),
    }
    quantizer = Gptq(**options) if method == "gptq" else Awq(**options, scaling=False)
    result = quantizer.run(model.with_weights(merged), context)
    return {name: result.weights[name] for name in merged}


def cost_of(base: QuantWeight, merged: Tensor, rounded: Weight) -> tuple[float, float]:
    """The relative error of a rounded weight against the float merge, and the share of the adapter's change in it.

    The share is the projection of what rounding made of the base on that change: 1 where it is kept whole, whatever
    else rounding did, and 0 where it is lost.
    """
    before, after = base.dense(), rounded.dense()
    change = (merged - before).double()
    share = ((after - before).double() * change).sum() / change.square().sum().clamp(min=1e-30)
    return relative_error(after, merged), float(share)


def linear_of(model: Model, name: str) -> str:
    """The linear, or table, whose weight is called ``name``; the head of a tied model."""
    module = name.removesuffix(".weight")
    return model.arch.head if model.is_tied and module == model.arch.embedding else module
