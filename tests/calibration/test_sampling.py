"""Sampled text: reproducible, cached, and distributed as the model says."""

from dataclasses import replace

import pytest
import torch

from llmopt.calibration import sampling
from llmopt.calibration.reference import Reference
from llmopt.calibration.sampling import Sampling, sample_tokens
from llmopt.optimizer.errors import InputError, PassError
from llmopt.optimizer.model import DenseWeight

WANTED = Sampling("evaluation", windows=5, tokens=12)


@pytest.fixture
def model(pair_of):
    return pair_of()[0]


@pytest.fixture
def forbidden(monkeypatch):
    """Makes any further sampling fail."""

    def forbid():
        monkeypatch.setattr(sampling, "Reference", lambda *_, **__: pytest.fail("sampled instead of read"))

    return forbid


def test_windows_start_with_the_first_token_and_stay_in_the_vocabulary(model):
    text = sample_tokens(model, WANTED)
    assert text.is_sampled
    assert text.ids.shape == (5, 12)
    assert text.ids.dtype == torch.int64
    assert (text.ids[:, 0] == 1).all()
    assert text.ids.min() >= 0
    assert text.ids.max() < 101


def test_the_second_time_the_text_comes_from_the_cache(model, forbidden):
    first = sample_tokens(model, WANTED)
    forbidden()
    again = sample_tokens(model, WANTED)
    assert torch.equal(first.ids, again.ids)
    assert first.digest == again.digest


def test_the_same_seed_gives_the_same_text_without_a_cache(model, monkeypatch, tmp_path):
    first = sample_tokens(model, WANTED)
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "another"))
    assert torch.equal(first.ids, sample_tokens(model, WANTED).ids)


@pytest.mark.parametrize("change", [{"seed": 1}, {"temperature": 0.5}, {"purpose": "calibration"}])
def test_another_seed_temperature_or_purpose_gives_another_text(model, change):
    assert sample_tokens(model, WANTED).digest != sample_tokens(model, replace(WANTED, **change)).digest


def test_evaluation_and_calibration_never_share_a_seed():
    seeds = {
        purpose: {Sampling(purpose, 1, 2, seed=seed).generator.initial_seed() for seed in (0, 1, 2, 3, 2**63 - 1)}
        for purpose in ("evaluation", "calibration")
    }
    assert len(seeds["evaluation"]) == len(seeds["calibration"]) == 5
    assert not seeds["evaluation"] & seeds["calibration"]


def test_a_sampling_that_is_interrupted_leaves_nothing_behind(model, monkeypatch, tmp_path):
    def interrupt(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_tokens(model, WANTED, progress=interrupt)
    assert not [path for path in (tmp_path / "llmopt-cache" / "samples").iterdir() if path.is_dir()]


def test_long_windows_are_made_of_texts_of_bounded_length(model):
    text = sample_tokens(model, Sampling("calibration", windows=3, tokens=22, longest=8))
    assert text.ids.shape == (3, 22)
    assert (text.ids[:, ::8] == 1).all()
    short = sample_tokens(model, Sampling("calibration", windows=9, tokens=8))
    assert torch.equal(text.ids.flatten(), short.ids.view(3, 24)[:, :22].flatten())


def test_progress_counts_every_step_up_to_the_total(model, monkeypatch):
    monkeypatch.setattr(sampling, "_BATCH_TOKENS", 64 * 4)
    calls = []
    sample_tokens(model, Sampling("evaluation", windows=70, tokens=4), progress=lambda *call: calls.append(call))
    assert [done for done, _ in calls] == [2, 3, 4, 6, 7, 8]
    assert {total for _, total in calls} == {8}


def test_after_an_end_a_new_text_begins(pair_of):
    model, _ = pair_of()
    ends = sorted(set(range(101)) - {1})[::2]
    model = type(model)(model.arch, {**model.config, "eos_token_id": ends}, model.weights, model.source)
    ids = sample_tokens(model, WANTED).ids
    after_end = ids[:, 1:][torch.isin(ids[:, :-1], torch.tensor(ends))]
    assert len(after_end)
    assert (after_end == 1).all()


@pytest.mark.parametrize(
    ("config", "first"), [({"bos_token_id": None}, {2}), ({"bos_token_id": None, "eos_token_id": None}, None)]
)
def test_a_model_without_a_first_token_starts_after_an_end_or_anywhere(pair_of, config, first):
    model, _ = pair_of()
    model = type(model)(model.arch, {**model.config, **config}, model.weights, model.source)
    starts = set(sample_tokens(model, Sampling("evaluation", windows=16, tokens=2)).ids[:, 0].tolist())
    assert starts == first if first else len(starts) > 5


def test_drawn_tokens_have_the_frequencies_of_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20000, 4)
    drawn = sampling._draw(logits, torch.Generator().manual_seed(0))
    frequencies = torch.bincount(drawn, minlength=4) / 20000
    # Four standard deviations of a frequency over 20,000 draws are at most 4 * sqrt(0.25 / 20000) = 0.014.
    torch.testing.assert_close(frequencies, logits[0].softmax(0), atol=0.014, rtol=0)


def test_the_text_follows_the_model(pair_of):
    """At a low temperature nearly every token is the model's most likely one."""
    model, _ = pair_of()
    ids = sample_tokens(model, Sampling("evaluation", windows=8, tokens=16, temperature=1e-3)).ids
    logits = Reference(model).logits(ids)[:, :-1]
    # Text is written in bfloat16 where that is fast, so near-ties may fall to the other token.
    best = (logits.max(-1).values - logits.gather(-1, ids[:, 1:, None])[..., 0]) < 0.1
    assert best.float().mean() > 0.95


def test_a_large_model_writes_the_same_text_a_layer_at_a_time(model, monkeypatch, tmp_path):
    expected = sample_tokens(model, WANTED)
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(sampling, "_RESIDENT_BYTES", 0)
    kinds = []
    monkeypatch.setattr(
        sampling, "Reference", lambda *a, **options: kinds.append(options["resident"]) or Reference(*a, **options)
    )
    assert torch.equal(sample_tokens(model, WANTED).ids, expected.ids)
    assert kinds == [False]


def test_a_large_gguf_file_is_unpacked_once_and_nothing_of_it_is_left(model, monkeypatch, tmp_path):
    reads = []

    def counted(name, weight):
        return DenseWeight(weight.shape, weight.dtype, lambda: reads.append(name) or weight.load())

    expected = sample_tokens(model, WANTED)
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(sampling, "_RESIDENT_BYTES", 0)
    weights = {name: counted(name, weight) for name, weight in model.weights.items()}
    packed = replace(model, weights=weights, source=replace(model.source, files={"it.gguf": "0"}))
    assert torch.equal(sample_tokens(packed, WANTED).ids, expected.ids)
    assert sorted(reads) == sorted(weights)
    (directory,) = (path for path in (tmp_path / "another/samples").iterdir() if path.is_dir())
    assert [path.name for path in directory.iterdir()] == ["ids.safetensors"]


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (float("nan"), PassError, "down_proj.weight has values that are not finite"),
        (3e38, InputError, "writes no text: its logits are not numbers"),
    ],
)
def test_a_model_that_computes_no_numbers_is_refused(model, value, error, said):
    name = "model.layers.1.mlp.down_proj.weight"
    broken = model.with_weights({name: DenseWeight.of(torch.full(model.weights[name].shape, value))})
    with pytest.raises(error, match=said):
        sample_tokens(broken, WANTED)


def test_windows_longer_than_the_context_are_refused(model):
    with pytest.raises(InputError, match="context has 128"):
        sample_tokens(model, Sampling("evaluation", windows=1, tokens=129))
