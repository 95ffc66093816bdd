"""Where a scale per channel can be moved from what makes a channel to what reads it, without changing the function.

A channel that is divided by s where it is made and multiplied by s where it is read is the same to everything else.
That holds where only linear maps lie between: from a norm's weight to the linears that read it (norm), from the values
through the attention's weighted sum to the output linear (value), and from the up projection through the product with
the gate to the down projection (up). AWQ, SmoothQuant and ``rescale`` choose the scales, each for its own reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmopt.optimizer.basis import Basis, Scaled
from llmopt.optimizer.decoder import Experts, Layer, Mlp, Norm
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import DenseWeight, Model, Weight

__all__ = ["ScalePair", "head_pairs", "layer_pairs", "scaled", "scaled_bases"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePair:
    """One place where scales can be moved.

    Attributes:
        kind: norm, value or up: what makes the channels.
        producer: The module that makes them: a norm, or a linear.
        rows: Which of the producer's outputs are the channels, in order, as (first, past the end): some of the rows of
            a packed linear.
        consumers: Every linear that reads the channels as its input columns, a mixture's router among them.
        channels: How many scales there are.
        head_dim: Of channels that are heads, which ``sharing`` heads of the consumer read each; else all channels.
        sharing: Query heads to a KV head; 1 where each channel is one column of the consumers.
        offset: What is added to a norm's stored weight.
    """

    kind: Literal["norm", "value", "up"]
    producer: str
    rows: tuple[tuple[int, int], ...]
    consumers: tuple[str, ...]
    channels: int
    head_dim: int
    sharing: int = 1
    offset: float = 0.0

    def columns(self, scale: Tensor) -> Tensor:
        """The scale of each input column of the consumers, ``[in]``, from that of each channel, ``[channels]``."""
        return scale.reshape(-1, 1, self.head_dim).expand(-1, self.sharing, -1).reshape(-1)

    def by_channel(self, columns: Tensor) -> Tensor:
        """What belongs to a consumer's columns, ``[..., in]``, sorted by channel: ``[..., sharing, channels]``."""
        by_head = columns.reshape(*columns.shape[:-1], -1, self.sharing, self.head_dim)
        return by_head.transpose(-3, -2).flatten(-2)


def layer_pairs(model: Model, index: int) -> list[ScalePair]:
    """The pairs of decoder layer ``index``, in data order.

    A norm whose output the residual stream takes too, or that stands behind a branch (OLMo 2, OPT-350m), makes none;
    nor does an up projection whose outputs go through another activation than ReLU, or through an online rotation.
    """
    layer = model.decoder.layers[index]
    pairs = [_norm_pair(model, norm, readers) for norm, readers in _norms(layer)]
    pairs.append(_value_pair(layer))
    if isinstance(layer.mlp, Experts):
        for _, up, down in layer.mlp.experts:
            pairs.append(_up_pair(model, up, down, packed=False))
    elif (name := _scalable_up(layer.mlp)) is not None and model.input_rotation(layer.mlp.down) is None:
        pairs.append(_up_pair(model, name, layer.mlp.down, packed=name == layer.mlp.packed))
    return pairs


def head_pairs(model: Model) -> list[ScalePair]:
    """That of the final norm with the linear behind it; none where the head's table is the embedding's too."""
    decoder = model.decoder
    reader = decoder.project_out or (None if model.is_tied else decoder.head)
    return [] if decoder.final_norm is None or reader is None else [_norm_pair(model, decoder.final_norm, (reader,))]


def scaled(model: Model, pair: ScalePair, scale: Tensor) -> dict[str, DenseWeight]:
    """The weights that change when ``scale`` is moved: the producer's divided, the consumers' columns multiplied.

    Args:
        model: Holds the weights; none is read before the result is.
        pair: One of the model's.
        scale: Float ``[channels]``, positive and finite.

    Returns:
        Name -> weight, float32 whatever the checkpoint's dtype: rounding a rescaled weight to bfloat16 again would move
        it by up to 0.4 % of itself, as much as 8-bit quantization does.

    Raises:
        PassError: A weight is quantized already.
        ValueError: ``scale`` has another shape, or a value that is not positive and finite.
    """
    if scale.shape != (pair.channels,):
        raise ValueError(f"{pair.producer} has {pair.channels} channels, not {list(scale.shape)} scales")
    if not (scale.isfinite().all() and (scale > 0).all()):
        raise ValueError(f"the scales of {pair.producer} are not all positive and finite")
    scale = scale.to(torch.float32)
    changed: dict[str, DenseWeight] = {}
    for name in (f"{pair.producer}.weight", f"{pair.producer}.bias"):
        if name in model.weights:
            offset = pair.offset if name.endswith(".weight") else 0.0
            weight = _float_weight(model.weights, name)
            factors = _row_factors(pair, scale, weight.shape[0])
            changed[name] = _times(weight, factors.reshape(-1, *[1] * (len(weight.shape) - 1)), offset)
    columns = pair.columns(scale)
    for name in (f"{module}.weight" for module in pair.consumers):
        changed[name] = _times(_float_weight(model.weights, name), columns[None])
    return changed


def scaled_bases(model: Model, pair: ScalePair, scale: Tensor) -> dict[str, Basis]:
    """What happens to the producer, where it is a linear, and to the consumers when ``scale`` is moved."""
    columns = Basis(columns=(Scaled(pair.columns(scale)),))
    bases = dict.fromkeys(pair.consumers, columns)
    if pair.kind != "norm":
        rows = model.weights[f"{pair.producer}.weight"].shape[0]
        bases[pair.producer] = Basis(rows=(Scaled(_row_factors(pair, scale, rows)),))
    return bases


@dataclass(frozen=True, slots=True)
class _Product:
    """Loads a weight times ``factors``, which have its number of dimensions and may be one row for all its rows."""

    weight: DenseWeight
    factors: Tensor
    offset: float

    def __call__(self) -> Tensor:
        return self.rows(0, self.weight.shape[0])

    def rows(self, first: int, past_end: int) -> Tensor:
        """See ``RowLoader.rows``."""
        factors = self.factors if len(self.factors) == 1 else self.factors[first:past_end]
        return (self.weight.rows(first, past_end).to(torch.float32) + self.offset) * factors - self.offset


def _times(weight: DenseWeight, factors: Tensor, offset: float = 0.0) -> DenseWeight:
    return DenseWeight(weight.shape, torch.float32, _Product(weight, factors, offset))


def _float_weight(weights: Mapping[str, Weight], name: str) -> DenseWeight:
    weight = weights[name]
    if not isinstance(weight, DenseWeight):
        raise PassError(
            f"{name} is already quantized to {weight.scheme.name}",
            hint="passes that move scales come before those that quantize",
        )
    return weight


def _row_factors(pair: ScalePair, scale: Tensor, rows: int) -> Tensor:
    """What each of the producer's outputs is multiplied with, ``[rows]``."""
    factors, done = torch.ones(rows), 0
    for first, past_end in pair.rows:
        factors[first:past_end] = 1 / scale[done : done + past_end - first]
        done += past_end - first
    return factors


def _norms(layer: Layer) -> list[tuple[Norm, tuple[str, ...]]]:
    """Each norm that only linears read, with these linears."""
    if layer.attention_in is not None and layer.attention_in == layer.mlp_in:
        return [(layer.attention_in, (*layer.attention.inputs, *layer.mlp.readers))]
    pairs = ((layer.attention_in, layer.attention.inputs), (layer.mlp_in, layer.mlp.readers))
    return [(norm, readers) for norm, readers in pairs if norm is not None]


def _norm_pair(model: Model, norm: Norm, readers: tuple[str, ...]) -> ScalePair:
    (width,) = model.weights[f"{norm.name}.weight"].shape
    return ScalePair(
        kind="norm",
        producer=norm.name,
        rows=((0, width),),
        consumers=readers,
        channels=width,
        head_dim=width,
        offset=norm.offset,
    )


def _value_pair(layer: Layer) -> ScalePair:
    attention = layer.attention
    return ScalePair(
        kind="value",
        producer=attention.values_in,
        rows=attention.value_rows,
        consumers=(attention.output,),
        channels=attention.kv_heads * attention.head_dim,
        head_dim=attention.head_dim,
        sharing=attention.heads // attention.kv_heads,
    )


def _scalable_up(mlp: Mlp) -> str | None:
    """The linear with the rows of the up projection, where scales pass through to the down projection."""
    if mlp.gate is None and mlp.packed is None and mlp.activation != "relu":
        return None
    return mlp.packed or mlp.up


def _up_pair(model: Model, up: str, down: str, *, packed: bool) -> ScalePair:
    """A packed linear has the rows of the gate first."""
    width = model.weights[f"{down}.weight"].shape[1]
    rows = (width, 2 * width) if packed else (0, width)
    return ScalePair(kind="up", producer=up, rows=(rows,), consumers=(down,), channels=width, head_dim=width)
