"""Rotary position embedding: the tables of cosines and sines an engine carries.

Frequencies are computed here, in float64, for the six kinds of transformers' ``rope_type``. Two of them depend on how
long a sequence has become (dynamic, longrope): an engine has them fixed for its capacity, and ``rope_note`` says so.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from llmopt.optimizer.decoder import Rope
from llmopt.optimizer.errors import InputError, UnsupportedError

__all__ = ["check_rope", "longest_with", "rope_note", "rope_tables"]

_Frequencies = tuple[npt.NDArray[np.float64], float]


def check_rope(rope: Rope) -> None:
    """Raise ``UnsupportedError`` or ``InputError`` when ``rope`` cannot be exported."""
    if rope.kind not in _KINDS:
        raise UnsupportedError(
            f"rope type {rope.kind!r} is not supported", hint=f"supported rope types: {', '.join(_KINDS)}"
        )
    if rope.dim < 2 or rope.dim % 2:
        raise InputError(f"rope rotates {rope.dim} columns of each head, which is no positive even number")
    try:
        frequencies, factor = _KINDS[rope.kind](rope, rope.max_positions)
    except KeyError as error:
        raise InputError(
            f"rope type {rope.kind} needs {error} in config.json's rope_parameters", hint="correct config.json"
        ) from error
    if frequencies.shape != (rope.dim // 2,) or not (np.isfinite(frequencies).all() and math.isfinite(factor)):
        raise InputError(
            f"rope type {rope.kind} gives no {rope.dim // 2} finite frequencies",
            hint="see rope_parameters in config.json: its factors belong to another head size",
        )


def longest_with(rope: Rope) -> int:
    """The longest sequence in tokens that ``rope`` was made for: dynamic scales beyond the model's own length."""
    if rope.kind == "dynamic":
        return int(rope.max_positions * float(rope.parameters["factor"]))
    return rope.max_positions


def rope_note(rope: Rope, capacity: int) -> str | None:
    """What is fixed by an engine of this capacity although transformers changes it with the sequence, if anything."""
    if rope.kind == "dynamic" and capacity > rope.max_positions:
        return f"dynamic rope is fixed at the frequencies for {capacity} tokens, also for shorter sequences"
    original = rope.parameters.get("original_max_position_embeddings", rope.max_positions)
    if rope.kind == "longrope":
        which = "long" if capacity > original else "short"
        return f"longrope is fixed at its {which} factors by the capacity {capacity}; they change at {original} tokens"
    return None


def rope_tables(rope: Rope, capacity: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosines and sines of every position's angles.

    Angles are computed in float64 and rounded once: at position 8,000 a float32 product would be off by up to 5e-4.

    Args:
        rope: What is rotated how.
        capacity: How many positions.

    Returns:
        Two float32 arrays ``[capacity, dim / 2]``, times the kind's attention factor.
    """
    frequencies, factor = _KINDS[rope.kind](rope, capacity)
    angles = np.arange(capacity, dtype=np.float64)[:, None] * frequencies[None]
    return (np.cos(angles) * factor).astype(np.float32), (np.sin(angles) * factor).astype(np.float32)


def _inverse(theta: float, dim: int) -> npt.NDArray[np.float64]:
    """``theta ** (-2 i / dim)`` for i below ``dim / 2``."""
    exponents: npt.NDArray[np.float64] = np.arange(0, dim, 2, dtype=np.float64) / dim
    return theta**-exponents


def _default(rope: Rope, _: int) -> _Frequencies:
    """Su et al. 2021, RoFormer, arXiv:2104.09864."""
    return _inverse(rope.theta, rope.dim), 1.0


def _linear(rope: Rope, _: int) -> _Frequencies:
    """Positions divided by a factor: Chen et al. 2023, position interpolation, arXiv:2306.15595."""
    return _inverse(rope.theta, rope.dim) / float(rope.parameters["factor"]), 1.0


def _dynamic(rope: Rope, capacity: int) -> _Frequencies:
    """A base that grows with the length beyond the model's own, as transformers' dynamic NTK scaling."""
    factor, length = float(rope.parameters["factor"]), max(capacity, rope.max_positions)
    growth = factor * length / rope.max_positions - (factor - 1)
    theta = rope.theta * growth ** (rope.dim / (rope.dim - 2))
    return _inverse(theta, rope.dim), 1.0


def _yarn(rope: Rope, _: int) -> _Frequencies:
    """Low frequencies interpolated, high ones kept: Peng et al. 2023, YaRN, arXiv:2309.00071, section 3.2."""
    options = rope.parameters
    original = float(options["original_max_position_embeddings"])
    factor = float(options.get("factor") or rope.max_positions / original)

    def dimension(rotations: float) -> float:
        """The pair of columns that turns this often within the original length."""
        return rope.dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(float(options.get("beta_fast") or 32)), dimension(float(options.get("beta_slow") or 1))
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = np.clip((np.arange(rope.dim // 2) - low) / (max(high - low, 0) or 1e-3), 0, 1)
    frequencies = _inverse(rope.theta, rope.dim)
    return frequencies / factor * ramp + frequencies * (1 - ramp), _yarn_attention(options, factor)


def _yarn_attention(options: Mapping[str, float], factor: float) -> float:
    """By what cosines and sines are multiplied; DeepSeek's mscale entries replace the paper's equation 22."""
    if options.get("attention_factor") is not None:
        return float(options["attention_factor"])

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if options.get("mscale") and options.get("mscale_all_dim"):
        return scale(float(options["mscale"])) / scale(float(options["mscale_all_dim"]))
    return scale(1.0)


def _llama3(rope: Rope, _: int) -> _Frequencies:
    """Long wavelengths stretched, short ones kept, those between interpolated: Llama 3.1's model card code."""
    options = rope.parameters
    original = float(options["original_max_position_embeddings"])
    low, high, factor = (float(options[name]) for name in ("low_freq_factor", "high_freq_factor", "factor"))
    frequencies = _inverse(rope.theta, rope.dim)
    smooth = np.clip((original * frequencies / (2 * math.pi) - low) / (high - low), 0, 1)
    return frequencies * ((1 - smooth) / factor + smooth), 1.0


def _longrope(rope: Rope, capacity: int) -> _Frequencies:
    """A factor for every frequency, in two sets: Ding et al. 2024, LongRoPE, arXiv:2402.13753."""
    options = rope.parameters
    original = int(options["original_max_position_embeddings"])
    factors = np.array(options["long_factor" if capacity > original else "short_factor"], np.float64)
    stretch = float(options.get("factor") or rope.max_positions / original)
    attention = options.get("attention_factor")
    if attention is None:
        attention = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    if factors.shape != (rope.dim // 2,):
        return factors, float(attention)
    return _inverse(rope.theta, rope.dim) / factors, float(attention)


_KINDS: Mapping[str, Callable[[Rope, int], _Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
