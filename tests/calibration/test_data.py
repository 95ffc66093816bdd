"""The calibration text that a recipe names, or that the model writes."""

import json
from dataclasses import replace

import pytest
import torch

from llmopt.calibration.data import calibration_of, checked_calibration
from llmopt.calibration.encoding import Encoder
from llmopt.calibration.texts import read_tokens
from llmopt.optimizer import hub
from llmopt.optimizer.calibration import Calibration
from llmopt.optimizer.contracts import WeightPass
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.recipe import NamedPass, Recipe
from llmopt.optimizer.sources import load_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Reader(WeightPass):
    """Looks at text."""

    needs_calibration = True

    def run(self, model, context):
        return model


PASSES = (NamedPass("reader", Reader()),)


@pytest.fixture
def model(tiny_llama, tmp_path):
    return load_model(str(tiny_llama), cache=tmp_path / "cache")


@pytest.fixture
def made(model, tmp_path):
    """The calibration data of a recipe whose ``calibration:`` has these options."""

    def made_(*, seed=0, passes=PASSES, offline=False, model=model, **options):
        settings = {"samples": 4, "tokens": 32} | options
        recipe = Recipe(
            version=1,
            model="m",
            passes=passes,
            export=(),
            base=tmp_path,
            seed=seed,
            calibration=Calibration(**settings),
        )
        return calibration_of(recipe, model, cache=tmp_path / "cache", offline=offline)

    return made_


@pytest.fixture
def lines(tmp_path):
    """A file of 40 texts, as JSON lines."""
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"The river number {n} comes down from {n * 17} hills. " * 3} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_without_a_pass_that_looks_at_text_nothing_is_made(made):
    assert made(source="none.txt", passes=()) is None


def test_a_file_is_read_as_the_recipe_says(made, lines, model):
    data = made(source="texts.jsonl", seed=3)
    text, entry = data.tokens(), data.entry()
    assert text.ids.shape == (4, 32)
    assert text.lengths is None
    assert text.name == "texts.jsonl"
    assert data.tokens() is text
    written = Encoder(model.source.tokenizer_dir).decode(text.ids[0].tolist())
    assert "comes down from" in written
    assert (entry.name, entry.digest) == ("texts.jsonl", text.digest)
    assert (entry.samples, entry.tokens, entry.packing, entry.seed) == (4, 32, "concat", 3)


def test_padded_text_says_where_it_ends(made, lines):
    text = made(source="texts.jsonl", packing="pad", tokens=256).tokens()
    assert text.lengths is not None
    assert 0 < text.lengths.min() <= text.lengths.max() < 256
    assert (text.ids[~text.mask] == 2).all()


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"samples": 3}, {"tokens": 16}, {"packing": "pad"}, {"field": "other"}]
)
def test_what_changes_the_windows_changes_the_digest(made, lines, change):
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    lines.write_text("".join(json.dumps({**row, "other": row["text"][::-1]}) + "\n" for row in rows))
    first, second = made(source="texts.jsonl"), made(source="texts.jsonl", **change)
    assert first.digest != second.digest
    assert not torch.equal(first.tokens().ids[:3, :16], second.tokens().ids[:3, :16]) or change.keys() & {"samples"}


def test_changed_contents_change_the_digest(made, lines):
    first = made(source="texts.jsonl").digest
    assert made(source="texts.jsonl").digest == first
    lines.write_text(lines.read_text().replace("river", "stream"))
    assert made(source="texts.jsonl").digest != first


def test_its_own_seed_counts_more_than_the_recipes(lines, model, tmp_path):
    texts = []
    for seed, own in ((0, 6), (1, 6), (1, None)):
        settings = Calibration(source="texts.jsonl", samples=4, tokens=32, seed=own)
        recipe = Recipe(version=1, model="m", passes=PASSES, export=(), base=tmp_path, seed=seed, calibration=settings)
        texts.append(calibration_of(recipe, model, cache=tmp_path).tokens().ids)
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[1], texts[2])


def test_text_is_sampled_from_the_model_where_none_is_named(made, model):
    data = made()
    assert data.tokens().is_sampled
    assert data.tokens().ids.shape == (4, 32)
    assert data.entry().name == "sampled"
    assert made().digest == data.digest != made(seed=1).digest
    other = replace(model, source=replace(model.source, digest="1" * 64))
    assert made(model=other).digest != data.digest


def test_windows_are_no_longer_than_the_context_unless_that_was_asked_for(made, tmp_path, model):
    assert made().settings.tokens == 32
    recipe = Recipe(version=1, model="m", passes=PASSES, export=(), base=tmp_path)
    assert calibration_of(recipe, model, cache=tmp_path).settings.tokens == 256
    with pytest.raises(InputError, match=r"calibration\.tokens is 257, the model's context has 256") as caught:
        made(tokens=257)
    assert "256 or less" in caught.value.hint


def test_a_missing_file_is_named(made):
    with pytest.raises(InputError, match=r"calibration\.source: there is no file .*none\.txt"):
        made(source="none.txt")


def test_evaluation_on_the_same_text_is_refused(tmp_path, model):
    (tmp_path / "text.txt").write_text("".join(f"The river number {n} comes down. " for n in range(200)))
    settings = Calibration(source="text.txt", samples=4, tokens=64)
    recipe = Recipe(version=1, model="m", passes=PASSES, export=(), base=tmp_path, calibration=settings)
    text = read_tokens(tmp_path / "text.txt", model.source.tokenizer_dir, windows=2, tokens=64)
    with pytest.raises(InputError, match=r"text text\.txt and the evaluation text .* are the same file"):
        checked_calibration(recipe, model, [text], cache=tmp_path)
    assert checked_calibration(recipe, model, [], cache=tmp_path).tokens().ids.shape == (4, 64)


@pytest.fixture
def dataset(tmp_path, monkeypatch, lines):
    """A data set in the local hub cache, with files of these names; no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def dataset_(*names):
        for name in names:
            path = tmp_path / "hub/datasets--org--texts/snapshots" / COMMIT / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(lines.read_bytes())

    return dataset_


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["README.md", "train.jsonl", "test.jsonl"], {}),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "train.csv"], {}),
        (["train/part.jsonl", "valid/part.jsonl"], {"split": "valid"}),
        (["one.jsonl", "two.jsonl"], {"file": "two.jsonl"}),
    ],
)
def test_a_data_set_of_the_hub_is_read(made, dataset, names, options):
    dataset(*names)
    data = made(source="org/texts@0123456", **options)
    assert data.tokens().name == "org/texts@0123456"
    assert data.tokens().ids.shape == (4, 32)


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (["one.jsonl"], {}, "has no files of the split train"),
        (["train/a.jsonl", "train/b.jsonl"], {}, "has 2 files of the split train"),
        (["train.jsonl"], {"file": "two.jsonl"}, "has no file two.jsonl"),
    ],
)
def test_a_data_set_without_that_file_says_what_it_has(made, dataset, names, options, said):
    dataset(*names)
    with pytest.raises(InputError, match=said) as caught:
        made(source=f"org/texts@{COMMIT}", **options)
    assert names[0] in caught.value.hint


def test_a_data_set_that_is_not_here_is_not_asked_for_offline(made, dataset):
    with pytest.raises(InputError, match="org/texts@0123456 is not in the local hub cache") as caught:
        made(source="org/texts@0123456", offline=True)
    assert "--repo-type dataset" in caught.value.hint


def test_a_data_set_must_be_pinned(made, dataset):
    with pytest.raises(InputError, match="as a data set on the hub it is not pinned to a commit"):
        made(source="org/texts@main")


def test_a_data_set_is_downloaded_online(made, dataset, lines, monkeypatch):
    import huggingface_hub

    asked = []

    class Api:
        def dataset_info(self, repo, revision):
            names = ["README.md", "train.jsonl"]
            siblings = [huggingface_hub.hf_api.RepoSibling(rfilename=name) for name in names]
            return type("Info", (), {"sha": COMMIT, "siblings": siblings})

    def download(repo, name, *, repo_type, revision):
        asked.append((repo, name, repo_type, revision))
        return str(lines)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert made(source="org/texts@0123456").tokens().ids.shape == (4, 32)
    assert asked == [("org/texts", "train.jsonl", "dataset", COMMIT)]
    assert hub.looks_like_id("org/texts@0123456")
