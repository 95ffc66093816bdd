"""Tables that are read by rows: the same numbers as with the table in memory, in every family."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from llmopt.calibration import large_table
from llmopt.calibration.reference import Reference
from llmopt.optimizer import model as model_module
from llmopt.optimizer.model import DenseWeight, QuantWeight
from llmopt.optimizer.rounding import quantize
from llmopt.optimizer.scheme import PRESETS
from llmopt.optimizer.sources import load_model

IDS = torch.arange(3 * 17).reshape(3, 17) * 7 % 101


@pytest.fixture
def _tables_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table is one, and is read four rows of the tiny models at a time."""
    monkeypatch.setattr(large_table, "_LARGE_BYTES", 0)
    monkeypatch.setattr(model_module, "_BLOCK_BYTES", 4 * 64 * 4)


@pytest.mark.usefixtures("_tables_are_large")
def test_every_family_computes_the_same(family_name: str, family_of, tmp_path: Path, monkeypatch) -> None:
    model = load_model(str(family_of(family_name)), cache=tmp_path)
    found = Reference(model).logits(IDS)
    monkeypatch.setattr(large_table, "_LARGE_BYTES", 1 << 30)
    expected = Reference(model).logits(IDS)
    # Products of some rows are summed in the same order as those of all, but for what BLAS makes of the shape.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.std()))


@pytest.mark.usefixtures("_tables_are_large")
def test_every_family_decodes_the_same_one_layer_at_a_time(family_name: str, family_of, tmp_path: Path) -> None:
    model = load_model(str(family_of(family_name)), cache=tmp_path)
    logits = []
    for resident in (True, False):
        reference, cache = Reference(model, resident=resident), DynamicCache()
        logits.append([reference.decode(ids, cache) for ids in (IDS[:, :5], IDS[:, 5:6], IDS[:, 6:7])])
    for resident, streamed in zip(*logits, strict=True):
        assert torch.equal(resident, streamed)


@pytest.mark.usefixtures("_tables_are_large")
def test_a_quantized_table_is_what_its_integers_stand_for(pair_of, monkeypatch) -> None:
    model, _ = pair_of()
    name = "model.embed_tokens.weight"
    scheme = PRESETS["W8A8"]
    model = model.with_weights({name: QuantWeight.of(quantize(model.weights[name].dense(), scheme), scheme)})
    found = Reference(model).logits(IDS)
    monkeypatch.setattr(large_table, "_LARGE_BYTES", 1 << 30)
    torch.testing.assert_close(found, Reference(model).logits(IDS))


@pytest.mark.usefixtures("_tables_are_large")
def test_a_large_table_is_never_read_whole(pair_of) -> None:
    class ByRows:
        def __init__(self, values: torch.Tensor) -> None:
            self.values = values

        def __call__(self) -> torch.Tensor:
            pytest.fail("it was read whole")

        def rows(self, first: int, past_end: int) -> torch.Tensor:
            return self.values[first:past_end]

    model, network = pair_of(tie_word_embeddings=False)
    tables = {
        name: DenseWeight(model.weights[name].shape, torch.float32, ByRows(model.weights[name].load()))
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    with torch.no_grad():
        expected = network(IDS).logits
    torch.testing.assert_close(Reference(model.with_weights(tables)).logits(IDS), expected, rtol=1e-5, atol=1e-5)


def test_only_tables_beyond_a_quarter_of_a_gigabyte_are_large() -> None:
    weight = DenseWeight((1 << 16, 1 << 10), torch.bfloat16, lambda: pytest.fail("it was read"))
    assert not large_table.is_large(weight, torch.float32)
    assert large_table.is_large(weight, torch.float64)
