"""What a ``config.json`` may not say: refused by name and in one sentence, before a model is made of it."""

from collections.abc import Collection, Mapping
from typing import Any

from llmopt.optimizer.arch.base import Arch, Key
from llmopt.optimizer.decoder import Decoder, Layer, Rope
from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.resolver import describe

__all__ = ["ROPE_TYPES", "check_completed", "check_given", "check_numbers"]

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")

_NO_DECODER = {
    "is_encoder_decoder": (True, "an encoder beside the decoder"),
    "add_cross_attention": (True, "attention to another model's states"),
    "use_bidirectional_attention": (True, "attention to later tokens"),
    "is_causal": (False, "attention to later tokens"),
    "alibi": (True, "positions by biases on attention scores (ALiBi)"),
}
"""Entry -> the value that no description of llmopt covers, and what it means."""

_COUNTS = (
    "vocab_size", "hidden_size", "n_embd", "intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size",
    "word_embed_proj_dim", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads",
    "num_kv_heads", "head_dim", "max_position_embeddings", "n_positions", "original_max_position_embeddings",
    "sliding_window", "num_experts", "num_local_experts", "num_experts_per_tok", "decoder_sparse_step",
)  # fmt: skip

_ATTENTION_KINDS = ("full_attention", "sliding_attention")

_ROPE_NUMBERS = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
    "attention_factor",
)  # fmt: skip


def check_given(config: Mapping[str, Any]) -> None:
    """Look at a config as it was read, before transformers does.

    Raises:
        UnsupportedError: It asks for an attention that llmopt has no description of.
        InputError: A number is not positive, or a list has not one entry for each layer.
    """
    for name, (refused, meaning) in _NO_DECODER.items():
        if config.get(name) is refused:
            raise UnsupportedError(
                f"{name}: {str(refused).lower()} in config.json is not supported: {meaning}",
                hint="llmopt compiles text decoders whose tokens see earlier tokens only",
            )
    check_numbers(config)


def check_numbers(config: Mapping[str, Any]) -> None:
    """The part of ``check_given`` that decoders and encoders have in common.

    Raises:
        UnsupportedError: A layer's kind is unknown.
        InputError: A number is not positive, or a list has not one entry for each layer.
    """
    for name in _COUNTS:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise InputError(f"{name} in config.json is {value}, which is not positive", hint="correct config.json")
    count = config.get("num_hidden_layers")
    for name in ("layer_types", "no_rope_layers"):
        entries = config.get(name)
        if isinstance(entries, list) and isinstance(count, int) and len(entries) != count:
            raise InputError(
                f"config.json has {count} layers, but {name} has length {len(entries)}", hint="correct config.json"
            )
    for i, kind in enumerate(config.get("layer_types") or ()):
        if kind not in _ATTENTION_KINDS:
            raise UnsupportedError(
                f"layer_types.{i} in config.json is {kind!r}", hint=f"supported: {', '.join(_ATTENTION_KINDS)}"
            )


def check_completed(config: Mapping[str, Any], arch: Arch, parameters: Collection[str]) -> None:
    """Look at a completed config, before transformers makes a module of it.

    Args:
        config: As ``hf_config.complete`` returns it.
        arch: The family.
        parameters: Names of the checkpoint's weights.

    Raises:
        UnsupportedError: It asks for an attention, a rope or an activation that llmopt has no description of.
        InputError: It contradicts itself.
    """
    variant = arch.for_config(config)
    for key in (variant.logit_scale, variant.logit_softcap, variant.attention.scale, variant.attention.softcap):
        _check_divisor(config, key)
    experts = variant.experts
    if experts is not None and config[experts.top_k.name] > config[experts.count.name]:
        raise InputError(
            f"{experts.top_k.name} in config.json is {config[experts.top_k.name]}, but there are only "
            f"{config[experts.count.name]} experts",
            hint="correct config.json",
        )
    for layer in _described(config, arch, parameters).layers:
        _check_layer(layer, config, variant)


def _described(config: Mapping[str, Any], arch: Arch, parameters: Collection[str]) -> Decoder:
    try:
        return describe(arch, config, parameters)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"config.json lacks an entry of the right type: {type(error).__name__}: {error}", hint="correct config.json"
        ) from error


def _check_divisor(config: Mapping[str, Any], key: Key | None) -> None:
    value = None if key is None else config.get(key.name)
    if key is not None and value is not None and not (_is_number(value) and value > 0):
        raise InputError(f"{key.name} in config.json is {value!r}, not a positive number", hint="correct config.json")


def _check_layer(layer: Layer, config: Mapping[str, Any], arch: Arch) -> None:
    i = int(layer.name.rpartition(".")[2])
    kinds = config.get("layer_types")
    if kinds and kinds[i] == "sliding_attention" and layer.attention.window is None:
        raise InputError(
            f"layer_types.{i} in config.json is 'sliding_attention', but there is no sliding_window",
            hint="correct config.json",
        )
    rope, head_dim = layer.attention.rope, layer.attention.head_dim
    if rope is None:
        return
    _check_rope(rope, head_dim)
    if rope.dim != head_dim and not arch.attention.partial_rope:
        raise UnsupportedError(
            f"partial_rotary_factor in config.json is {rope.dim / head_dim:g}, which {arch.name} models do not have",
            hint="remove it: transformers ignores it there, or fails",
        )


def _check_rope(rope: Rope, head_dim: int) -> None:
    if rope.kind not in ROPE_TYPES:
        raise UnsupportedError(
            f"rope type {rope.kind!r} in config.json is not supported",
            hint=f"supported rope types: {', '.join(ROPE_TYPES)}",
        )
    for name in rope.parameters:
        if name.startswith("mrope_"):
            raise UnsupportedError(
                f"{name} of config.json's rope is not supported: positions of text, height and width",
                hint="llmopt compiles text decoders, whose tokens have one position each",
            )
    numbers = {"rope_theta": rope.theta, **{name: rope.parameters.get(name) for name in _ROPE_NUMBERS}}
    for name, value in numbers.items():
        if value is not None and not (_is_number(value) and value > 0):
            raise InputError(f"{name} of config.json's rope is {value!r}, not a positive number", hint="correct it")
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    if rope.kind == "llama3" and low is not None and high is not None and low >= high:
        raise InputError(
            f"low_freq_factor of config.json's rope is {low}, not below its high_freq_factor {high}", hint="correct it"
        )
    if not 2 <= rope.dim <= head_dim or rope.dim % 2:
        raise InputError(
            f"config.json has rope turn {rope.dim} of the {head_dim} columns of each head",
            hint="columns are turned in pairs; see head_dim and partial_rotary_factor",
        )
    for name in ("short_factor", "long_factor"):
        factors = rope.parameters.get(name, ())
        if rope.kind == "longrope" and factors and len(factors) != rope.dim // 2:
            raise InputError(
                f"{name} of config.json's rope has length {len(factors)}, but heads have {rope.dim // 2} frequencies",
                hint="the factors belong to another head size",
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
