"""What each graph pass did to an engine, as the manifest has it: to its operators, and to what it computes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmopt.optimizer.manifest import PassRecord

__all__ = ["KINDS", "WHOLE", "Effect", "by_kind", "effects_of", "short_name", "verification_of"]

KINDS = ("matrix products", "attention", "norms", "rounding", "elementwise", "data movement")
"""What operators do, for plots: six colours say more than one per operator."""

WHOLE = "all"
"""Among the verified graph passes: the lowered graph against the standard one."""

_IN_NAMES = {
    "matrix products": ("MatMul", "Gemm", "MoE", "Experts"),
    "attention": ("Attention", "Rotary", "Mask", "TensorScatter", "Softmax"),
    "norms": ("Normalization",),
    "rounding": ("Quantize", "Dequantize"),
}
_MOVEMENT = {
    *("Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "GatherElements", "GatherND"),
    *("Identity", "Range", "Reshape", "ScatterElements", "ScatterND", "SelectRows", "Shape", "Size", "Slice", "Split"),
    *("Squeeze", "Tile", "Transpose", "Unsqueeze"),
}


@dataclass(frozen=True, slots=True)
class Effect:
    """One graph pass.

    Attributes:
        name: The pass.
        applied: How often.
        declined: Why it left near-matches alone -> how many.
        before: Operator, with its domain unless that is ai.onnx's, -> how many of its nodes.
        after: The same behind the pass.
    """

    name: str
    applied: int
    declined: Mapping[str, int]
    before: Mapping[str, int]
    after: Mapping[str, int]

    @property
    def changes(self) -> dict[str, int]:
        """Operator -> nodes more or less than before; what went away first, the largest changes first."""
        difference = {name: self.after.get(name, 0) - self.before.get(name, 0) for name in {*self.before, *self.after}}
        changed = ((name, count) for name, count in difference.items() if count)
        return dict(sorted(changed, key=lambda item: (item[1] > 0, -abs(item[1]), item[0])))


def effects_of(records: Sequence[PassRecord]) -> list[Effect]:
    """The graph passes among ``records`` that counted operators, in order; those of older builds did not."""
    return [
        Effect(
            record.name,
            int(record.details.get("applied", 0)),
            Counter(record.details.get("declined", ())),
            record.details["operators"]["before"],
            record.details["operators"]["after"],
        )
        for record in records
        if "operators" in record.details
    ]


def verification_of(records: Sequence[PassRecord]) -> dict[str, dict[str, float]]:
    """Layer -> graph pass, or ``all`` -> how far the logits behind it are from those before; empty if not verified."""
    found: dict[str, dict[str, float]] = {}
    for record in records:
        if record.name == "verify_lowering":
            for layer, difference in record.details.items():
                # Builds before each pass was verified by itself have the one number of all of them.
                found[layer] = difference if isinstance(difference, dict) else {WHOLE: difference}
    return found


def by_kind(operators: Mapping[str, int]) -> dict[str, int]:
    """Each of ``KINDS`` -> how many of the operators are of that kind."""
    found = dict.fromkeys(KINDS, 0)
    for name, count in operators.items():
        found[_kind(short_name(name))] += count
    return found


def short_name(operator: str) -> str:
    """Without the domain: ``com.microsoft::QuickGelu`` -> ``QuickGelu``."""
    return operator.rpartition("::")[2]


def _kind(name: str) -> str:
    for kind, parts in _IN_NAMES.items():
        if any(part in name for part in parts):
            return kind
    return "data movement" if name in _MOVEMENT else "elementwise"
