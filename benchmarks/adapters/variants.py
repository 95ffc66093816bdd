"""The builds that are compared: recipes in one folder with the adapter and its texts, as a user would write them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BASE", "HELD_OUT", "TRAINED_ON", "VARIANTS", "Variant", "write_recipe"]

TRAINED_ON, HELD_OUT = "trained-on.jsonl", "held-out.txt"
"""Texts beside the recipes."""

_CONTENT = """\
version: 1
model: {model}
{body}export:
  - onnx: {{target: cpu{lora}}}
"""

_LORA = ", lora: {max_rank: 16, slots: 2}"

_MERGE = """\
passes:
  - merge_lora: {adapters: [{path: adapter}]}
"""

_W8A8 = """\
  - rescale: {}
  - rotate: {online: {down_proj: 64}}
  - round_to_nearest: {scheme: W8A8, embedding: W8A16}
"""

_GATE = f"""\
accept:
  - {{metric: perplexity, data: {HELD_OUT}, windows: 8, tokens: 512, max_increase: 1.6%}}
"""

_CALIBRATION = f"""\
calibration: {{source: {TRAINED_ON}, field: messages, samples: 16, tokens: 512}}
"""

_INT4 = """\
  - rescale: {}
  - gptq: {scheme: W4A16, group_size: 32}
"""


@dataclass(frozen=True, slots=True)
class Variant:
    """One build of the model with the adapter.

    Attributes:
        name: Of its recipe and its folder.
        title: What tables call it.
        body: The recipe between ``model:`` and ``export:``.
        modular: Whether the adapter is added to the finished build, instead of being in its weights.
        max_difference: Largest accepted difference of a logit from PEFT's; None where weights are rounded.
        max_increase: Largest accepted increase of perplexity over PEFT's, as a share; None where that is only shown.
    """

    name: str
    title: str
    body: str
    modular: bool = False
    max_difference: float | None = None
    max_increase: float | None = None


BASE = Variant("base", "the base, without the adapter", "passes: []\naccept: []\n")
"""What the adapter was trained on, to show what it does."""

VARIANTS: Sequence[Variant] = (
    Variant("merged", "merged, fp32", f"{_MERGE}accept: []\n", max_difference=1e-3),
    Variant("merged-w8a8", "merged, W8A8, rotated", _MERGE + _W8A8 + _GATE, max_increase=0.016),
    Variant("merged-int4", "merged, int4, GPTQ", f"{_CALIBRATION}{_MERGE}{_INT4}accept: []\n"),
    Variant("modular", "modular, fp32", "passes: []\naccept: []\n", modular=True, max_difference=1e-3),
    Variant(
        "modular-w8a8", "modular, W8A8, rotated", f"passes:\n{_W8A8}accept: []\n", modular=True, max_increase=0.025
    ),
)
"""Merged, the adapter is in the weights before all else. rescale takes the model off the 4-bit grid of its file."""


def write_recipe(variant: Variant, folder: Path, *, model: str) -> Path:
    """Write the recipe of a variant into the folder with the adapter and the texts."""
    path = folder / f"{variant.name}.yaml"
    lora = _LORA if variant.modular else ""
    path.write_text(_CONTENT.format(model=model, body=variant.body, lora=lora), encoding="utf-8")
    return path
