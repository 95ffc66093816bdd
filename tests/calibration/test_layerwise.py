"""Text on its way through a decoder: the hidden states and inputs of the whole model run at once."""

from pathlib import Path

import pytest
import torch

from llmopt.calibration import layerwise
from llmopt.calibration.layerwise import Layerwise, observe_both
from llmopt.calibration.reference import Reference
from llmopt.optimizer.model import DenseWeight
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens

IDS = torch.arange(5 * 11).reshape(5, 11) * 7 % 101


@pytest.fixture(autouse=True)
def _two_windows_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "_BATCH_TOKENS", 22)


@pytest.fixture
def model(pair_of):
    return pair_of()[0]


def run_of(model, tmp_path, *, in_memory=1 << 30, **changes):
    tokens = Tokens(name="it", ids=IDS, digest="0", **changes)
    return Layerwise(model, tokens, dtype=torch.float32, directory=tmp_path / "work", in_memory=in_memory)


def inputs_of(run, modules):
    found: dict[str, list[torch.Tensor]] = {}
    run.observe(modules, lambda module, rows: found.setdefault(module, []).append(rows))
    return {module: torch.cat(rows) for module, rows in found.items()}


def expected_inputs(model, index, module, ids=IDS):
    """What enters a linear of a layer, by a hook on the whole model's run."""
    reference, found = Reference(model, resident=True), []
    reference.module(module).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].flatten(0, -2)))
    hidden = reference.embed(ids)
    for each in range(index + 1):
        hidden = reference.layer(each, hidden)
    return torch.cat(found)


def test_each_layer_sees_what_the_one_before_it_gives(model, tmp_path: Path) -> None:
    run = run_of(model, tmp_path)
    assert run.batches == 3
    for index, layer in enumerate(model.decoder.layers):
        found = inputs_of(run, layer.linears)
        for module in layer.linears:
            torch.testing.assert_close(found[module], expected_inputs(model, index, module), rtol=1e-4, atol=1e-5)
        run.advance()
    assert run.index == model.num_layers


def test_a_layer_is_left_before_what_nobody_asked_for_is_computed(model, tmp_path: Path) -> None:
    run = run_of(model, tmp_path)
    layer = model.decoder.layers[0]
    run.reference.module(layer.mlp.down).register_forward_pre_hook(lambda *_: pytest.fail("it was reached"))
    inputs_of(run, layer.attention.linears)
    inputs_of(run, layer.mlp.inputs)


def test_a_replaced_weight_changes_what_follows_it(model, tmp_path: Path) -> None:
    run = run_of(model, tmp_path)
    layer = model.decoder.layers[0]
    name = f"{layer.attention.output}.weight"
    changed = {name: DenseWeight.of(model.weights[name].dense() * 1.5)}
    before = inputs_of(run, [layer.mlp.down])
    run.update(changed)
    after = inputs_of(run, [layer.mlp.down])
    expected = expected_inputs(model.with_weights(changed), 0, layer.mlp.down)
    torch.testing.assert_close(after[layer.mlp.down], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before[layer.mlp.down], expected, rtol=1e-2)
    run.advance()
    query = model.decoder.layers[1].attention.query
    expected = expected_inputs(model.with_weights(changed), 1, query)
    torch.testing.assert_close(inputs_of(run, [query])[query], expected, rtol=1e-4, atol=1e-5)


def test_two_runs_are_shown_row_by_row_and_the_exact_one_may_leave_at_once(model, tmp_path: Path) -> None:
    working, exact = run_of(model, tmp_path), run_of(model, tmp_path)
    layer = model.decoder.layers[0]
    name = f"{layer.attention.output}.weight"
    working.update({name: DenseWeight.of(model.weights[name].dense() * 1.5)})
    pairs = []
    observe_both(
        working, exact, [layer.mlp.down], lambda _, rows, other: pairs.append((rows, other)), exact_leaves=True
    )
    rows, others = (torch.cat(each) for each in zip(*pairs, strict=True))
    torch.testing.assert_close(others, expected_inputs(model, 0, layer.mlp.down), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rows, others, rtol=1e-2)
    exact.reference.module(layer.mlp.down).register_forward_pre_hook(lambda *_: pytest.fail("the layer ran again"))
    exact.advance()
    working.advance()
    query = model.decoder.layers[1].attention.query
    found = inputs_of(exact, [query])[query]
    torch.testing.assert_close(found, expected_inputs(model, 1, query), rtol=1e-4, atol=1e-5)
    assert exact.index == working.index == 1


@pytest.mark.parametrize("family_name", ["olmo2", "opt-350m", "llama"])
def test_what_was_shown_stays_when_the_windows_leave(family_name, family_of, tmp_path: Path) -> None:
    """Also where a linear reads the residual stream itself."""
    model = load_model(str(family_of(family_name)), cache=tmp_path)
    working, exact = run_of(model, tmp_path), run_of(model, tmp_path)
    pairs = []
    linears = model.decoder.layers[0].linears
    observe_both(working, exact, linears, lambda _, *rows: pairs.append(rows), exact_leaves=True)
    assert len(pairs) == 3 * len(linears)
    assert all(torch.equal(rows, others) for rows, others in pairs)


def test_padding_is_left_out(model, tmp_path: Path) -> None:
    lengths = torch.tensor([11, 3, 7, 1, 11])
    run = run_of(model, tmp_path, lengths=lengths)
    query = model.decoder.layers[1].attention.query
    run.advance()
    whole = expected_inputs(model, 1, query).reshape(5, 11, -1)
    expected = torch.cat([row[:length] for row, length in zip(whole, lengths.tolist(), strict=True)])
    torch.testing.assert_close(inputs_of(run, [query])[query], expected, rtol=1e-4, atol=1e-5)


def test_what_exceeds_the_memory_lies_in_a_file_that_disappears_with_it(model, tmp_path: Path, monkeypatch) -> None:
    expected = inputs_of(run_of(model, tmp_path), [model.decoder.layers[0].mlp.down])
    assert not (tmp_path / "work").exists()
    mapped = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *a, **o: mapped.append(o["size"]) or from_file(*a, **o))
    found = inputs_of(run_of(model, tmp_path, in_memory=100), [model.decoder.layers[0].mlp.down])
    assert mapped == [IDS.numel() * 48]
    assert list((tmp_path / "work").iterdir()) == []
    for module, rows in found.items():
        assert torch.equal(rows, expected[module])


def test_rows_are_shown_in_float32_whatever_is_computed_in(model, tmp_path: Path) -> None:
    tokens = Tokens(name="it", ids=IDS, digest="0")
    run = Layerwise(model, tokens, dtype=torch.bfloat16, directory=tmp_path)
    query = model.decoder.layers[0].attention.query
    found = inputs_of(run, [query])[query]
    assert found.dtype == torch.float32
    # bfloat16 has 8 bits: rows that went through one norm agree to some of its steps.
    torch.testing.assert_close(found, expected_inputs(model, 0, query), rtol=0.03, atol=0.03)
