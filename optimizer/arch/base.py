"""What a model family is to the compiler: the names of its parts, and which config entries shape the computation.

A family's file holds one ``Arch``. Nothing in it depends on a checkpoint; ``optimizer/resolver.py`` resolves it with a
checkpoint's config into the numbers that are compiled.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Arch", "AttentionPart", "ExpertsPart", "Key", "LayerNorms", "MlpPart"]


@dataclass(frozen=True, slots=True)
class Key:
    """A number in ``config.json``.

    Attributes:
        name: The entry, as transformers' config class spells it.
        default: Its value where the config lacks it or holds null.
        power: The exponent it is raised to.
    """

    name: str
    default: float | None = None
    power: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPart:
    """Attention, by module names below a layer.

    Attributes:
        query, key, value: Linears of their own; None when ``packed`` holds all three.
        packed: One linear with the rows of query, key and value.
        packing: How those rows lie. parts: all of query, then key, then value. groups: for each KV head its query
            heads, then its key, then its value.
        output: The linear behind the attention.
        query_norm, key_norm: Norms of query and key before rope.
        norm_span: Whether these norms span one head or all heads of a token.
        heads, kv_heads: How many; a constant for families that have a fixed number.
        scale: What query times key is multiplied with; None: ``head_dim ** -0.5``.
        softcap: Scores s become ``softcap * tanh(s / softcap)`` where the config has a number.
        rope: Whether positions enter by rotary embedding.
        partial_rope: Whether the config may have it turn a part of each head only.
    """

    output: str
    query: str | None = None
    key: str | None = None
    value: str | None = None
    packed: str | None = None
    packing: Literal["parts", "groups"] = "parts"
    query_norm: str | None = None
    key_norm: str | None = None
    norm_span: Literal["head", "all"] = "head"
    heads: Key = Key("num_attention_heads")
    kv_heads: Key | int = Key("num_key_value_heads")
    scale: Key | None = None
    softcap: Key | None = None
    rope: bool = True
    partial_rope: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpPart:
    """A feed-forward network, by module names below a layer: ``down(activation(gate(x)) * up(x))``.

    Attributes:
        gate: None for ``down(activation(up(x)))``.
        up, down: Linears.
        packed: One linear with the rows of gate, then up, instead of both.
        activation: The config entry that names the activation.
    """

    down: str
    gate: str | None = None
    up: str | None = None
    packed: str | None = None
    activation: str = "hidden_act"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsPart:
    """A mixture of gated experts, by module names below a layer; ``{e}`` is the expert's number.

    Attributes:
        router: The linear whose outputs rank the experts.
        gate, up, down: Each expert's linears.
        count: How many experts there are.
        top_k: How many of them a token reaches.
        normalize: Whether the weights of a token's experts are divided by their sum.
        activation: The config entry that names the activation.
        stacked_gate_up, stacked_down: The parameters of transformers' module that hold all experts as one tensor,
            ``[experts, 2 * inner, hidden]`` and ``[experts, hidden, inner]``.
    """

    router: str
    gate: str
    up: str
    down: str
    count: Key
    top_k: Key
    normalize: Key | Literal[True]
    activation: str = "hidden_act"
    stacked_gate_up: str = "mlp.experts.gate_up_proj"
    stacked_down: str = "mlp.experts.down_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNorms:
    """Where a layer normalizes, by module names below it; None where it does not.

    Attributes:
        attention_in, mlp_in: Of what enters a branch.
        attention_out, mlp_out: Of what a branch adds to the residual stream.
        attention_after, mlp_after: Of the residual stream itself, behind the addition.
    """

    attention_in: str | None = None
    attention_out: str | None = None
    attention_after: str | None = None
    mlp_in: str | None = None
    mlp_out: str | None = None
    mlp_after: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """One family of decoder-only models.

    Attributes:
        name: The family: its file's name.
        models: Architecture in ``config.json`` -> ``model_type``, of every checkpoint this description covers.
        attention, mlp, experts, norms: The parts of a layer. A layer has experts where the checkpoint has its router.
        parallel: The config entry, or a constant, that says whether attention and MLP both read the layer's input.
        norm: The kind of all norms: RMS, or LayerNorm with bias.
        norm_epsilon: Its epsilon.
        norm_offset: Added to the stored weights of norms.
        residual_scale: What a branch is multiplied with before it is added.
        layer: A decoder layer's module name.
        embedding, final_norm, head: Module names outside the layers; no final norm where the checkpoint has none.
        embedding_scale: What embeddings are multiplied with.
        positions: A table of learned positions.
        positions_offset: Its first row that stands for a position.
        project_in, project_out: Linears behind the embedding and before the head, where the checkpoint has them.
        logit_scale: What logits are multiplied with.
        logit_softcap: Logits l become ``softcap * tanh(l / softcap)`` where the config has a number.
        refused: Config entries whose value changes the computation in a way this description does not cover.
        variants: Descriptions that replace this one where the config has all of the given values; the first wins.
        transposed: Linears below a layer that the checkpoint stores as ``[in, out]`` (GPT-2's Conv1D).
        module_names: Parts of names that transformers' module spells otherwise than checkpoints: theirs by ours.
        gguf: The architecture's name in a GGUF file; None when llmopt does not read that family from one.
        gguf_interleaves: Whether that format stores the rows of query and key with the two halves of each head
            interleaved, for llama.cpp's older rotary embedding.
    """

    name: str
    models: Mapping[str, str]
    attention: AttentionPart
    mlp: MlpPart
    norms: LayerNorms
    experts: ExpertsPart | None = None
    parallel: str | bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: Key = Key("rms_norm_eps")
    norm_offset: float = 0.0
    residual_scale: Key = Key("residual_multiplier", default=1.0)
    layer: str = "model.layers.{i}"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    embedding_scale: Key = Key("embedding_multiplier", default=1.0)
    positions: str | None = None
    positions_offset: int = 0
    project_in: str | None = None
    project_out: str | None = None
    logit_scale: Key = Key("logits_scaling", default=1.0, power=-1.0)
    logit_softcap: Key | None = None
    refused: Mapping[str, Any] = field(default_factory=dict)
    variants: tuple[tuple[Mapping[str, Any], "Arch"], ...] = ()
    transposed: tuple[str, ...] = ()
    module_names: Mapping[str, str] = field(default_factory=dict)
    gguf: str | None = None
    gguf_interleaves: bool = False

    def for_config(self, config: Mapping[str, Any]) -> "Arch":
        """The variant of this description that a checkpoint with this config has."""
        for values, variant in self.variants:
            if all(config.get(name) == value for name, value in values.items()):
                return variant
        return self
