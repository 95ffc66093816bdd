"""What llmopt's families are in a GGUF file: llama.cpp's name, numbers, and the order of rows that its kernels take.

Each of them was compared with the reference in llama.cpp itself; a family without an entry is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType

from llmopt.optimizer.decoder import Decoder, Layer, Rope
from llmopt.optimizer.errors import UnsupportedError
from llmopt.optimizer.model import Model

__all__ = ["FAMILIES", "Family", "family_of", "ignored_window", "write_numbers"]


@dataclass(frozen=True, slots=True)
class Family:
    """One ``model_type`` of ``config.json``.

    Attributes:
        arch: llama.cpp's architecture.
        interleaves: Whether the two halves of each query and key head alternate, for its older rotary embedding.
        fits: Why llama.cpp would compute something else than a model of this family does; None where it would not.
        more: Writes what only this family has.
    """

    arch: MODEL_ARCH
    interleaves: bool = False
    fits: Callable[[Decoder], str | None] = lambda decoder: None
    more: Callable[[GGUFWriter, Model], None] = lambda writer, model: None


def _windows(decoder: Decoder) -> list[bool]:
    return [layer.attention.window is not None for layer in decoder.layers]


def _every(step: int) -> Callable[[Decoder], str | None]:
    """llama.cpp has the pattern of windows in its source: all layers but each ``step``-th."""

    def fits(decoder: Decoder) -> str | None:
        if _windows(decoder) != [bool((i + 1) % step) for i in range(len(decoder.layers))]:
            return f"llama.cpp has windows in all layers but each {step}th, and this model has other ones"
        layer = decoder.layers[0].attention
        if abs(layer.scale * layer.head_dim**0.5 - 1) > 1e-6:
            return "llama.cpp scales scores by the size of heads, and this model by another number"
        return None

    return fits


def _fits_smollm3(decoder: Decoder) -> str | None:
    if [layer.attention.rope is None for layer in decoder.layers] != [
        (i + 1) % 4 == 0 for i in range(len(decoder.layers))
    ]:
        return "llama.cpp leaves rope out of each 4th layer, and this model of others"
    return None


def _granite(writer: GGUFWriter, model: Model) -> None:
    decoder = model.decoder
    writer.add_attention_scale(decoder.layers[0].attention.scale)
    writer.add_embedding_scale(decoder.embedding_scale)
    writer.add_residual_scale(decoder.layers[0].residual_scale)
    writer.add_logit_scale(1 / decoder.logit_scale)


def _gemma2(writer: GGUFWriter, model: Model) -> None:
    decoder = model.decoder
    _window(writer, model)
    if (softcap := decoder.layers[0].attention.softcap) is not None:
        writer.add_attn_logit_softcapping(softcap)
    if decoder.logit_softcap is not None:
        writer.add_final_logit_softcapping(decoder.logit_softcap)


def _window(writer: GGUFWriter, model: Model) -> None:
    window = next((layer.attention.window for layer in model.decoder.layers if layer.attention.window), None)
    if window is not None:
        writer.add_sliding_window(window)


def _gemma3(writer: GGUFWriter, model: Model) -> None:
    _window(writer, model)
    inside = next((layer.attention.rope for layer in model.decoder.layers if layer.attention.window), None)
    if inside is not None:
        writer.add_rope_freq_base_swa(inside.theta)


FAMILIES: Mapping[str, Family] = {
    "llama": Family(MODEL_ARCH.LLAMA, interleaves=True),
    "mistral": Family(MODEL_ARCH.LLAMA, interleaves=True),
    "qwen2": Family(MODEL_ARCH.QWEN2),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "smollm3": Family(MODEL_ARCH.SMOLLM3, interleaves=True, fits=_fits_smollm3),
    "granite": Family(MODEL_ARCH.GRANITE, interleaves=True, more=_granite),
    "gemma2": Family(MODEL_ARCH.GEMMA2, fits=_every(2), more=_gemma2),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, fits=_every(6), more=_gemma3),
    "phi3": Family(MODEL_ARCH.PHI3, more=_window),
    "olmo2": Family(MODEL_ARCH.OLMO2),
}
"""``model_type`` -> what it is there."""

_WINDOWED = ("gemma2", "gemma3_text")
"""Whose windows llama.cpp has; it ignores those of other families."""


def family_of(model: Model) -> Family:
    """The family of a model.

    Raises:
        UnsupportedError: llama.cpp's form of it is not known here, or would compute something else.
    """
    kind = str(model.config["model_type"])
    family = FAMILIES.get(kind)
    if family is None:
        raise UnsupportedError(f"{kind} models are not written as GGUF", hint=f"written are {', '.join(FAMILIES)}")
    reason = family.fits(model.decoder) or next(filter(None, map(_rope_refusal, model.decoder.layers)), None)
    if reason is not None:
        raise UnsupportedError(f"{kind}: {reason}", hint="export a checkpoint instead")
    return family


def ignored_window(model: Model) -> int | None:
    """The window that llama.cpp would ignore, in tokens; None where it has it, or there is none."""
    if model.config["model_type"] in _WINDOWED:
        return None
    return next((layer.attention.window for layer in model.decoder.layers if layer.attention.window), None)


def _rope_refusal(layer: Layer) -> str | None:
    rope = layer.attention.rope
    if rope is not None and rope.kind not in ("default", "linear", "llama3", "yarn"):
        return f"rope type {rope.kind} is not written as GGUF"
    return None


def write_numbers(writer: GGUFWriter, model: Model, family: Family) -> None:
    """The hyperparameters, under llama.cpp's names."""
    decoder, config = model.decoder, model.config
    attention = decoder.layers[0].attention
    writer.add_context_length(decoder.max_positions)
    writer.add_embedding_length(decoder.hidden_size)
    writer.add_block_count(len(decoder.layers))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(attention.heads)
    writer.add_head_count_kv(decoder.kv_heads)
    writer.add_key_length(decoder.head_dim)
    writer.add_value_length(decoder.head_dim)
    writer.add_vocab_size(decoder.vocab_size)
    writer.add_layer_norm_rms_eps(float(config[model.arch.norm_epsilon.name]))
    whole = [layer.attention.rope for layer in decoder.layers if layer.attention.window is None]
    ropes = [rope for rope in [*whole, *(layer.attention.rope for layer in decoder.layers)] if rope is not None]
    if ropes:
        _write_rope(writer, ropes[0])
    family.more(writer, model)


def _write_rope(writer: GGUFWriter, rope: Rope) -> None:
    """Of the layers that see everything, where others have another one."""
    writer.add_rope_dimension_count(rope.dim)
    writer.add_rope_freq_base(rope.theta)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope.parameters["factor"]))
    if rope.kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope.parameters["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope.parameters["original_max_position_embeddings"]))
