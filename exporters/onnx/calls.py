"""Calls of an engine of one layer, within the engine contract, for comparing two graphs of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmopt.exporters.onnx.adapter_inputs import is_adapter_input
from llmopt.optimizer.decoder import Decoder

__all__ = ["CALLS", "CAPACITY", "Call", "run_calls"]

CAPACITY = 32


@dataclass(frozen=True, slots=True)
class Call:
    """One run of an engine.

    Attributes:
        tokens: New tokens of each sequence.
        lengths: Cached tokens of each sequence before.
        rows: Which positions of all reach the head, in this order; by default all.
    """

    tokens: int
    lengths: tuple[int, ...]
    rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        plural = "" if self.tokens == 1 else "s"
        return f"{self.tokens} token{plural} behind {', '.join(map(str, self.lengths))} cached ones"


_CACHE_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}

CALLS = (
    Call(tokens=17, lengths=(0,)),
    Call(tokens=14, lengths=(17,), rows=(13, 4, 9, 4, 1)),
    Call(tokens=1, lengths=(31, 4, 0, 16, 9), rows=(2, 0, 4, 1, 3)),
    Call(tokens=5, lengths=(0, 0, 0)),
)
"""A prompt in two chunks up to the last position but one, a step over sequences of different length that share its
beginning, one of them new and one up to the last position, and a batch without a past."""


def run_calls(
    session: Any, decoder: Decoder, seed: int, names: Sequence[str] = ("logits",)
) -> list[dict[str, np.ndarray]]:
    """The named outputs of each of ``CALLS``; its caches are those that the calls before have left.

    Args:
        session: An engine of one layer.
        decoder: Of that layer.
        seed: Of the token ids.
        names: Of the outputs wanted.
    """
    generator = np.random.default_rng(seed)
    shape = (1, decoder.kv_heads, CAPACITY, decoder.head_dim)
    kinds = {value.name: value.type for value in session.get_inputs()}
    adapters, factors = _random_adapters(session, generator), _random_factors(session, generator)
    caches = [np.zeros(shape, _CACHE_TYPES[kinds["past.0.key"]])] * 2
    results = []
    for call in CALLS:
        batch = len(call.lengths)
        caches = [np.repeat(cache[:1], batch, axis=0) for cache in caches]
        feeds = {
            "input_ids": generator.integers(0, decoder.vocab_size, (batch, call.tokens)),
            "past_lengths": np.array(call.lengths),
            "logit_rows": np.array(call.rows or range(batch * call.tokens)),
            "past.0.key": caches[0],
            "past.0.value": caches[1],
            **adapters,
            **factors,
        }
        if adapters:
            feeds["adapters"] = np.arange(1, batch + 1) % (len(adapters["lora.ranks"]) + 1)
        *outputs, key, value = session.run([*names, "present.0.key", "present.0.value"], feeds)
        caches = [key, value]
        results.append(dict(zip(names, outputs, strict=True)))
    return results


def _random_adapters(session: Any, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Factors that change a linear's results about as much as its weight makes them; nothing where none are taken."""
    shapes = {value.name: value.shape for value in session.get_inputs()}
    if "lora.ranks" not in shapes:
        return {}
    slots, modules = shapes["lora.ranks"]
    rank = np.full((slots, modules), 4)
    rank[:, -1] = 0  # an adapter need not have every linear
    factors = generator.standard_normal(shapes["lora.factors"], np.float32) * np.float32(0.1)
    return {"lora.factors": factors, "lora.ranks": rank}


def _random_factors(session: Any, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """The same of an adapter of rank 4 whose factors are inputs each; see ``adapter_inputs.py``."""
    found = {}
    for value in session.get_inputs():
        if is_adapter_input(value.name):
            shape = [size if isinstance(size, int) else 4 for size in value.shape]
            found[value.name] = generator.standard_normal(shape, np.float32) * np.float32(0.1)
    return found
