"""The rows of the comparison as data: which passes of ours, and which method of which other program."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmopt.optimizer.errors import InputError
from llmopt.optimizer.loader import names, nearest

__all__ = ["OURS", "ROWS", "Row", "available", "chosen"]

OURS = "llmopt"

_W4 = {"scheme": "W4A16", "group_size": 32}
_STATIC = {
    "weights": {"num_bits": 8, "strategy": "channel"},
    "input_activations": {"num_bits": 8, "strategy": "tensor", "dynamic": False},
}
_AUTO = {
    "budget": {"bits": 4.5},
    "candidates": [*({"scheme": "W4A16", "group_size": size} for size in (64, 32, 16)), "W8A16"],
    "method": "gptq",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A way to quantize the model.

    Attributes:
        name: What ``--rows`` calls it.
        method: As printed.
        scheme: As printed.
        program: ``llmopt``, or a name in ``PEERS``.
        passes: Of ours: the ``passes:`` of a recipe.
        options: Of another program: what its script is told.
        head: Whether the judge rounds embedding and head, where they are still in float, to W8A16 in groups of 32.
    """

    name: str
    method: str
    scheme: str
    program: str = OURS
    passes: Sequence[Mapping[str, Mapping[str, Any]]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    rounds_head: bool = True


def _ours(
    name: str, method: str, scheme: str, *passes: Mapping[str, Mapping[str, Any]], rounds_head: bool = True
) -> Row:
    return Row(name, method, scheme, passes=passes, rounds_head=rounds_head)


def _peer(name: str, program: str, method: str, /, **options: Any) -> Row:
    return Row(name, method, "W4A16 g32", program=program, options=options)


ROWS: tuple[Row, ...] = (
    _ours("float", "none", "float", rounds_head=False),
    _ours("float-w8-head", "none", "float, head W8A16 g32"),
    _ours("rtn-w4", "round_to_nearest", "W4A16 g32", {"round_to_nearest": _W4}),
    _ours("gptq-w4", "gptq", "W4A16 g32", {"gptq": _W4}),
    _ours("awq-w4", "awq", "W4A16 g32", {"awq": _W4}),
    _ours("awq-gptq-w4", "awq, gptq", "W4A16 g32", {"awq": {**_W4, "rounds": False}}, {"gptq": _W4}),
    _ours("auto-4.5", "auto_bits, gptq", "4.5 bits", {"auto_bits": _AUTO}),
    _peer("gptqmodel-gptq", "gptqmodel", "gptq"),
    _peer("llmcompressor-gptq", "llmcompressor", "gptq", method="gptq"),
    _peer("llmcompressor-awq", "llmcompressor", "awq", method="awq"),
    _peer("nncf-rtn", "nncf", "round to nearest"),
    _peer("nncf-awq", "nncf", "awq, scale estimation", awq=True, scale_estimation=True),
    _peer("nncf-gptq", "nncf", "gptq, scale estimation", gptq=True, scale_estimation=True),
    _ours("rtn-w8a8", "round_to_nearest", "W8A8", {"round_to_nearest": {"scheme": "W8A8"}}),
    _ours("rotate-w8a8", "rotate, round_to_nearest", "W8A8", {"rotate": {}}, {"round_to_nearest": {"scheme": "W8A8"}}),
    _ours(
        "rotate-online-w8a8",
        "rotate online, round_to_nearest",
        "W8A8",
        {"rotate": {"online": {"down_proj": 64}}},
        {"round_to_nearest": {"scheme": "W8A8"}},
    ),
    _ours(
        "smoothquant-w8a8",
        "smoothquant, round_to_nearest",
        "W8A8",
        {"smoothquant": {}},
        {"round_to_nearest": {"scheme": "W8A8"}},
    ),
    _ours("rotate-gptq-w8a8", "rotate, gptq", "W8A8", {"rotate": {}}, {"gptq": {"scheme": "W8A8"}}),
    _ours(
        "rotate-online-gptq-w8a8",
        "rotate online, gptq",
        "W8A8",
        {"rotate": {"online": {"down_proj": 512}}},
        {"gptq": {"scheme": "W8A8"}},
    ),
    *(
        _ours(f"{name}-{bits}", method, f"{scheme} g32", {method: {"scheme": scheme, "group_size": 32}})
        for bits, scheme in (("w3", "W3A16"), ("w2", "W2A16"))
        for name, method in (("rtn", "round_to_nearest"), ("gptq", "gptq"), ("awq", "awq"))
    ),
    _ours("static-w8a8", "round_to_nearest", "W8A8, static inputs", {"round_to_nearest": {"scheme": _STATIC}}),
    _ours(
        "rotate-static-w8a8",
        "rotate online, round_to_nearest",
        "W8A8, static inputs",
        {"rotate": {"online": {"down_proj": 512}}},
        {"round_to_nearest": {"scheme": _STATIC}},
    ),
    *(
        _ours(
            f"rtn-{scheme.lower().replace('_', '-')}",
            "round_to_nearest",
            f"{scheme}, head float",
            {"round_to_nearest": {"scheme": scheme, "head": "none"}},
            rounds_head=False,
        )
        for scheme in ("FP8", "FP8_BLOCK")
    ),
    _ours(
        "rtn-fp8-dynamic",
        "round_to_nearest",
        "FP8_DYNAMIC, head float",
        {"round_to_nearest": {"scheme": "FP8_DYNAMIC", "head": "none"}},
        rounds_head=False,
    ),
    _ours(
        "smoothquant-fp8-dynamic",
        "smoothquant, round_to_nearest",
        "FP8_DYNAMIC, head float",
        {"smoothquant": {}},
        {"round_to_nearest": {"scheme": "FP8_DYNAMIC", "head": "none"}},
        rounds_head=False,
    ),
    _ours("kv-int8", "kv_cache", "int8 KV, head float", {"kv_cache": {}}, rounds_head=False),
)


def available(rows: Iterable[Row]) -> list[Row]:
    """Those whose passes this llmopt has."""
    known = names("passes")
    return [row for row in rows if all(name in known for step in row.passes for name in step)]


def chosen(rows: Sequence[Row], wanted: Sequence[str]) -> list[Row]:
    """The rows called ``wanted``, in their own order; a program's name means all of its rows, nothing means all.

    Raises:
        InputError: There is no such row.
    """
    known = {row.name for row in rows} | {row.program for row in rows}
    for name in wanted:
        if name not in known:
            raise InputError(f"there is no row {name!r}", hint=nearest(name, known) or f"rows are {', '.join(known)}")
    return [row for row in rows if not wanted or row.name in wanted or row.program in wanted]
