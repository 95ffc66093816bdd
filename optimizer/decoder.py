"""What one checkpoint computes: a family's description resolved with its config, in names and numbers only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Activation", "Attention", "Decoder", "Experts", "Layer", "Mlp", "Norm", "Rope"]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A norm over the last axis: RMS norm, or LayerNorm, which has a bias too.

    Attributes:
        name: Its module.
        kind: rms or layer.
        epsilon: Added to the mean square, or to the variance.
        offset: Added to the stored weight.
    """

    name: str
    kind: Literal["rms", "layer"]
    epsilon: float
    offset: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """A rotary position embedding.

    Attributes:
        kind: transformers' ``rope_type``.
        theta: The base of the frequencies.
        dim: Columns of each head that are rotated, the first ones.
        max_positions: The config's max_position_embeddings.
        parameters: What else the kind takes, as in the config's ``rope_parameters``.
    """

    kind: str
    theta: float
    dim: int
    max_positions: int
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One layer's attention; see ``AttentionPart`` for the names.

    Attributes:
        window: A token sees itself and the ``window - 1`` tokens before it; None: all tokens before it.
        rope: None where positions do not enter here.
    """

    query: str | None
    key: str | None
    value: str | None
    packed: str | None
    packing: Literal["parts", "groups"]
    output: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None
    window: int | None
    rope: Rope | None
    query_norm: Norm | None
    key_norm: Norm | None
    norm_span: Literal["head", "all"]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The linears that read the attention's input, in data order."""
        return tuple(name for name in (self.query, self.key, self.value, self.packed) if name is not None)

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears in data order."""
        return (*self.inputs, self.output)

    @property
    def cache_scales(self) -> tuple[str, str]:
        """The weights that hold the scales of cached keys and values, in a model whose cache is quantized."""
        module = self.output.rpartition(".")[0]
        return f"{module}.k_scale", f"{module}.v_scale"

    @property
    def values_in(self) -> str:
        """The linear that makes the values."""
        name = self.packed or self.value
        assert name is not None
        return name

    @property
    def value_rows(self) -> tuple[tuple[int, int], ...]:
        """The rows of ``values_in`` that make them, head by head, as (first, past the end)."""
        size, group = self.head_dim, self.heads // self.kv_heads
        if self.packed is None:
            firsts = [head * size for head in range(self.kv_heads)]
        elif self.packing == "parts":
            firsts = [(self.heads + self.kv_heads + head) * size for head in range(self.kv_heads)]
        else:
            firsts = [(head * (group + 2) + group + 1) * size for head in range(self.kv_heads)]
        return tuple((first, first + size) for first in firsts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """One layer's feed-forward network; see ``MlpPart``."""

    gate: str | None
    up: str | None
    packed: str | None
    down: str
    activation: Activation

    @property
    def inputs(self) -> tuple[str, ...]:
        """The linears that read the network's input, in data order."""
        return tuple(name for name in (self.gate, self.up, self.packed) if name is not None)

    @property
    def readers(self) -> tuple[str, ...]:
        """The same: nothing else reads it."""
        return self.inputs

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears in data order."""
        return (*self.inputs, self.down)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """One layer's mixture of experts; see ``ExpertsPart``.

    Attributes:
        router: Kept in floating point: it is small and decides which experts compute.
        experts: Gate, up and down of each expert.
    """

    router: str
    experts: tuple[tuple[str, str, str], ...]
    top_k: int
    normalize: bool
    activation: Activation

    @property
    def inputs(self) -> tuple[str, ...]:
        """The linears that read the mixture's input, in data order."""
        return tuple(name for expert in self.experts for name in expert[:2])

    @property
    def readers(self) -> tuple[str, ...]:
        """The same and the router: everything that reads it."""
        return (self.router, *self.inputs)

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears but the router, expert by expert."""
        return tuple(name for expert in self.experts for name in expert)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer; see ``LayerNorms`` for where it normalizes.

    Attributes:
        name: Its module.
        parallel: Whether the MLP reads the layer's input instead of the stream behind the attention.
        residual_scale: What both branches are multiplied with before they are added.
    """

    name: str
    attention: Attention
    mlp: Mlp | Experts
    parallel: bool
    residual_scale: float
    attention_in: Norm | None
    attention_out: Norm | None
    attention_after: Norm | None
    mlp_in: Norm | None
    mlp_out: Norm | None
    mlp_after: Norm | None

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears that may be quantized, in data order."""
        return (*self.attention.linears, *self.mlp.linears)

    @property
    def stages(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """The same in the order they are computed: linears of one stage need nothing of one another.

        Within a stage those that read the same rows are together; an expert's rows are its own.
        """
        entering: tuple[tuple[str, ...], ...] = (self.mlp.inputs,)
        leaving: tuple[tuple[str, ...], ...]
        if isinstance(self.mlp, Experts):
            entering = tuple(expert[:2] for expert in self.mlp.experts)
            leaving = tuple(expert[2:] for expert in self.mlp.experts)
        else:
            leaving = ((self.mlp.down,),)
        return ((self.attention.inputs,), ((self.attention.output,),), entering, leaving)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A decoder-only model; see ``Arch`` for the parts outside the layers.

    Attributes:
        kv_heads, head_dim: Of every layer's cache.
        max_positions: The longest sequence it was made for, in tokens.
        positions: None where positions enter by rope alone, or not at all.
    """

    name: str
    layers: tuple[Layer, ...]
    vocab_size: int
    hidden_size: int
    kv_heads: int
    head_dim: int
    max_positions: int
    embedding: str
    embedding_scale: float
    positions: str | None
    positions_offset: int
    project_in: str | None
    project_out: str | None
    final_norm: Norm | None
    head: str
    logit_scale: float
    logit_softcap: float | None

    @property
    def expert_linears(self) -> frozenset[str]:
        """The linears of all mixtures of experts."""
        return frozenset(name for layer in self.layers if isinstance(layer.mlp, Experts) for name in layer.mlp.linears)

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear that may be quantized, in data order, the head last."""
        return (*(name for layer in self.layers for name in layer.linears), self.head)

    @property
    def ropes(self) -> list[Rope]:
        """The different ropes of the layers."""
        ropes: list[Rope] = []
        for layer in self.layers:
            if layer.attention.rope is not None and layer.attention.rope not in ropes:
                ropes.append(layer.attention.rope)
        return ropes
