"""What graph passes did to operators, from hand-made records."""

from llmopt.evaluation.operators import KINDS, by_kind, effects_of, short_name
from llmopt.optimizer.manifest import PassRecord


def record(before, after, **details):
    return PassRecord(name="it", changed=True, details={**details, "operators": {"before": before, "after": after}})


def test_changes_name_what_went_before_what_came_and_the_largest_first():
    before = {"Add": 2, "Mul": 6, "MatMul": 9, "Sigmoid": 3}
    after = {"Mul": 3, "MatMul": 9, "com.microsoft::QuickGelu": 3, "Cast": 1, "Abs": 1}
    [effect] = effects_of([record(before, after, applied=3, declined=["b", "a", "b"])])
    expected = {"Mul": -3, "Sigmoid": -3, "Add": -2, "com.microsoft::QuickGelu": 3, "Abs": 1, "Cast": 1}
    assert list(effect.changes.items()) == list(expected.items())
    assert (effect.name, effect.applied) == ("it", 3)
    assert effect.declined == {"b": 2, "a": 1}


def test_records_without_operators_are_left_out():
    records = [PassRecord(name="old", changed=True, details={"applied": 1}), record({"Add": 1}, {"Add": 1})]
    [effect] = effects_of(records)
    assert (effect.applied, effect.declined, effect.changes) == (0, {}, {})


def test_every_operator_is_of_one_kind():
    kinds = {
        "matrix products": ["MatMul", "FusedMatMul", "MatMulIntegerToFloat", "MatMulNBits", "QMoE", "Experts"],
        "attention": ["SlotAttention", "GroupQueryAttention", "RotaryEmbedding", "SlidingMask", "TensorScatter"],
        "norms": ["RMSNormalization", "LayerNormalization", "SkipSimplifiedLayerNormalization"],
        "rounding": ["QuantizeLinear", "DequantizeLinear", "QuantizeDequantizePerToken"],
        "elementwise": ["Add", "Abs", "QuickGelu", "NeverHeardOf"],
        "data movement": ["Gather", "SelectRows", "Split", "Cast"],
    }
    assert tuple(kinds) == KINDS
    for kind, names in kinds.items():
        assert by_kind({f"some.domain::{name}": 2 for name in names}) == {
            **dict.fromkeys(KINDS, 0),
            kind: 2 * len(names),
        }


def test_a_short_name_has_no_domain():
    assert (short_name("com.microsoft::QuickGelu"), short_name("Mul")) == ("QuickGelu", "Mul")
