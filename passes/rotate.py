"""Rotate the residual stream and the attention's heads, so that no channel stands out when values are rounded."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from llmopt.optimizer.basis import Basis, Scaled, Turned
from llmopt.optimizer.contracts import Feature, PassContext, WeightPass
from llmopt.optimizer.decoder import Decoder, Experts, Layer, Norm
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import DenseWeight, Model, Weight
from llmopt.optimizer.rotation import Rotation
from llmopt.passes._preparing import refuse_quantized
from llmopt.passes._rotation import random_rotation
from llmopt.passes._turned import Turn, norm_values, turned_linear, turned_norm, turned_table

__all__ = ["Rotate"]


class Online(BaseModel):
    """Rotations that the engine computes itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    down_proj: PositiveInt = Field(
        description="Channels that are rotated together before the down projection; divides its input's width."
    )


class Rotate(WeightPass):
    """Multiply weights by random orthogonal matrices that cancel each other, as QuaRot and SpinQuant do.

    A few channels of the residual stream are up to a thousand times larger than the others, and take most of an
    integer's levels. After a rotation all channels are alike, and the model computes the same: whatever writes to the
    stream is multiplied by the matrix, whatever reads it by the transposed matrix, and norms, which keep their input's
    direction, are given weights of ones. Helps where activations are rounded; rounding weights alone in small groups
    gets worse.

    Source: Ashkboos et al. 2024, QuaRot, arXiv:2404.00456; Liu et al. 2024, SpinQuant, arXiv:2405.16406 (R1, R2). Not
    in the papers: widths that are no power of two, models with LayerNorm (a rotation that keeps the mean), and the
    online rotation works on blocks. Weights are stored in float32 whatever the checkpoint's dtype: rounding them to
    bfloat16 again would move each by up to 0.4 %, which is what 8 bits cost.
    """

    keeps_function: ClassVar[bool] = True
    records_bases: ClassVar[bool] = True

    residual: bool = Field(
        True, description="Whether the residual stream is rotated and norms are folded into linears."
    )
    heads: bool = Field(
        True, description="Whether values are rotated, head by head, up to the attention's output linear."
    )
    online: Online | None = Field(
        None, description="What is rotated while the engine runs, at the cost of a small matrix multiplication each."
    )

    @property
    def adds(self) -> frozenset[Feature]:
        """See ``WeightPass.adds``."""
        return frozenset({"an online rotation"} if self.online is not None else ())

    def fits(self, model: Model) -> None:
        """See ``WeightPass.fits``: the family has what is to be rotated, in widths that blocks divide."""
        if not (self.residual or self.heads or self.online):
            raise PassError("residual, heads and online are all off", hint="remove the pass, or switch one of them on")
        if self.residual:
            _refuse_residual(model)
        if self.online is not None:
            _refuse_online(model, self.online.down_proj)

    def requires(self, model: Model) -> None:
        """See ``WeightPass.requires``."""
        super().requires(model)
        refuse_quantized(model, "rotate")
        if self.online is not None:
            _refuse_second_online(model)

    def run(self, model: Model, context: PassContext) -> Model:
        """See ``WeightPass.run``. Records the order of each rotation and the orders of its factors."""
        turns = self._turns(model, torch.Generator().manual_seed(context.seed))
        steps = model.num_layers + 1
        weights, bases = turns.outside(model, context)
        changed: dict[str, Weight] = dict(context.keep(weights))
        context.progress(1, steps)
        for done, layer in enumerate(model.decoder.layers, start=2):
            weights, turned = turns.layer(model, layer)
            changed |= context.keep(weights)
            bases |= turned
            context.progress(done, steps)
        context.detail("rotations", turns.orders())
        return model.with_weights(changed).with_bases(bases)

    def _turns(self, model: Model, generator: torch.Generator) -> "_Turns":
        decoder = model.decoder
        residual = heads = online = None
        if self.residual:
            keeps_mean = any(norm.kind == "layer" for norm in _norms(decoder))
            residual = random_rotation(decoder.hidden_size, generator, keeps_mean=keeps_mean)
        if self.heads:
            heads = random_rotation(decoder.head_dim, generator)
        if self.online is not None:
            online = random_rotation(self.online.down_proj, generator)
        return _Turns(residual, heads, online)


def _norms(decoder: Decoder) -> list[Norm]:
    """Those that read the residual stream."""
    norms = [norm for layer in decoder.layers for norm in (layer.attention_in, layer.mlp_in)]
    return [norm for norm in (*norms, decoder.final_norm) if norm is not None]


def _refuse_residual(model: Model) -> None:
    for layer in model.decoder.layers:
        behind = {
            "behind a branch": layer.attention_out or layer.mlp_out,
            "in the residual stream itself": layer.attention_after or layer.mlp_after,
        }
        for place, norm in behind.items():
            if norm is not None:
                raise PassError(
                    f"the residual stream of {model.decoder.name} cannot be rotated: {norm.name} stands {place}, and "
                    "its weight scales channels that a rotation would mix",
                    hint="residual: false rotates the heads only",
                )


def _refuse_online(model: Model, block: int) -> None:
    for layer in model.decoder.layers:
        if isinstance(layer.mlp, Experts):
            raise PassError(
                f"{layer.name} has a mixture of experts, which no kernel runs with an online rotation",
                hint="leave out online",
            )
        width = model.weights[f"{layer.mlp.down}.weight"].shape[1]
        if width % block:
            fitting = [size for size in (16, 32, 64, 96, 128, 192, 256, 512) if width % size == 0]
            raise PassError(
                f"{layer.mlp.down} has {width} input columns, not a multiple of online.down_proj={block}",
                hint=f"sizes that fit it: {', '.join(map(str, fitting)) or width}",
            )


def _refuse_second_online(model: Model) -> None:
    for layer in model.decoder.layers:
        if not isinstance(layer.mlp, Experts) and model.input_rotation(layer.mlp.down) is not None:
            raise PassError(f"{layer.mlp.down} has an online rotation already", hint="rotate once")


_Changed = tuple[dict[str, Weight], dict[str, Basis]]
"""New weights by parameter, and what happened to linears and tables by module."""


@dataclass(frozen=True, slots=True)
class _Turns:
    """The rotations of one run, each None where it is off, and what they do to a model's parts."""

    residual: Rotation | None
    heads: Rotation | None
    online: Rotation | None

    def orders(self) -> dict[str, list[int]]:
        """Name -> the orders of the rotation's factors."""
        rotations = {"residual": self.residual, "heads": self.heads, "online": self.online}
        return {name: [len(f) for f in turn.factors] for name, turn in rotations.items() if turn is not None}

    def outside(self, model: Model, context: PassContext) -> _Changed:
        """What changes before the first layer and behind the last."""
        if self.residual is None:
            return {}, {}
        decoder = model.decoder
        weights, bases = self._behind_last_layer(model, self.residual, context)
        if decoder.project_in is not None:
            bases[decoder.project_in] = Turn(rows=self.residual).basis(model)
            weights |= turned_linear(model, decoder.project_in, bases[decoder.project_in])
        else:
            name = f"{decoder.embedding}.weight"
            bases[decoder.embedding] = Basis(columns=(Turned(self.residual),))
            weights[name] = turned_table(_dense(model, name), self.residual)
        if decoder.positions is not None:
            name = f"{decoder.positions}.weight"
            weights[name] = turned_table(_dense(model, name), self.residual)
        return weights, bases

    def _behind_last_layer(self, model: Model, residual: Rotation, context: PassContext) -> _Changed:
        """The final norm, and the linear that reads it: the head, which may need a table of its own from now on."""
        decoder, norm = model.decoder, model.decoder.final_norm
        reader = decoder.project_out or decoder.head
        if norm is None or _is_constant(model, norm):
            bases = {reader: Basis(columns=(Turned(residual),))}
            is_turned = reader == decoder.head and model.is_tied  # with the embedding
            if is_turned:
                return {}, bases
            return {f"{reader}.weight": turned_table(_dense(model, f"{reader}.weight"), residual)}, bases
        table = _dense(model, model.weight_of(reader))
        if reader == decoder.head and model.is_tied:
            context.note(
                f"{reader} has a table of its own now, {table.shape[0]} x {table.shape[1]}: the final norm's weight is "
                "folded into it, and not into the embedding"
            )
        scale, _ = norm_values(model, norm)
        turned = turned_table(table, residual, scale=scale)
        bases = {reader: Basis(columns=(Scaled(scale), Turned(residual)))}
        return {f"{reader}.weight": turned, **turned_norm(model, norm, residual, keeps_shift=True)}, bases

    def layer(self, model: Model, layer: Layer) -> _Changed:
        """What changes in one layer."""
        bases = {module: turn.basis(model) for module, turn in self._linears(model, layer)}
        changed: dict[str, Weight] = {}
        for module, basis in bases.items():
            changed |= turned_linear(model, module, basis)
        if self.residual is not None:
            for norm, readers in _readers(layer).items():
                changed |= turned_norm(model, norm, self.residual, keeps_shift=not _have_biases(model, readers))
        if self.online is not None:
            assert not isinstance(layer.mlp, Experts)
            changed[f"{layer.mlp.down}.input_rotation"] = DenseWeight.of(self.online.matrix().to(torch.float32))
        return changed, bases

    def _linears(self, model: Model, layer: Layer) -> Iterator[tuple[str, Turn]]:
        """Every linear that changes, and how: readers of the stream, then writers."""
        attention, mlp = layer.attention, layer.mlp
        norms = {name: (norm, readers) for norm, readers in _readers(layer).items() for name in readers}
        for name in (*attention.inputs, *mlp.readers):
            norm, readers = norms.get(name, (None, ())) if self.residual else (None, ())
            turn = Turn(
                norm=norm,
                takes_shift=_have_biases(model, readers),
                columns=self.residual,
                rows=self.heads if name == attention.values_in else None,
                spans=attention.value_rows,
            )
            if turn.columns or turn.rows:
                yield name, turn
        downs = [expert[2] for expert in mlp.experts] if isinstance(mlp, Experts) else [mlp.down]
        writers: Mapping[str, Rotation | None] = {attention.output: self.heads, **dict.fromkeys(downs, self.online)}
        for name, columns in writers.items():
            if columns or self.residual:
                yield name, Turn(columns=columns, rows=self.residual)


def _readers(layer: Layer) -> dict[Norm, tuple[str, ...]]:
    """Each norm of a layer that reads the residual stream -> the linears that read it."""
    found: dict[Norm, tuple[str, ...]] = {}
    for norm, linears in ((layer.attention_in, layer.attention.inputs), (layer.mlp_in, layer.mlp.readers)):
        if norm is not None:
            found[norm] = (*found.get(norm, ()), *linears)
    return found


def _have_biases(model: Model, linears: tuple[str, ...]) -> bool:
    """Whether each can take a norm's bias into its own."""
    return all(f"{name}.bias" in model.weights for name in linears)


def _is_constant(model: Model, norm: Norm) -> bool:
    """Whether a norm treats all channels alike, so that it commutes with a rotation."""
    scale, shift = norm_values(model, norm)
    return bool((scale == scale[0]).all()) and (shift is None or not shift.any())


def _dense(model: Model, name: str) -> DenseWeight:
    weight = model.weights[name]
    assert isinstance(weight, DenseWeight)
    return weight
