"""Checkpoints of encoders: with and without a head, and configs that ask for another computation."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForMaskedLM

from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.sources import load_model


@pytest.fixture
def changed(encoder_of, tmp_path):
    """Copies a tiny encoder with other config entries."""

    def make(name="bert", **entries):
        folder = tmp_path / "model"
        shutil.copytree(encoder_of(name), folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))
        return folder

    return make


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet", "modernbert"])
def test_of_a_checkpoint_with_a_head_the_encoder_is_taken(encoder_of, tmp_path, name):
    plain = load_model(str(encoder_of(name)), cache=tmp_path / "cache")
    network = AutoModelForMaskedLM.from_pretrained(encoder_of(name))
    network.save_pretrained(tmp_path / "with-head")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(encoder_of(name) / file, tmp_path / "with-head" / file)
    model = load_model(str(tmp_path / "with-head"), cache=tmp_path / "cache")
    assert model.config["architectures"][0].endswith("ForMaskedLM")
    assert model.weights.keys() == plain.weights.keys()
    assert all(torch.equal(weight.load(), plain.weights[name].load()) for name, weight in model.weights.items())


@pytest.mark.parametrize(
    ("name", "entry", "value", "supported"),
    [
        ("bert", "position_embedding_type", "relative_key", "absolute"),
        ("bert", "is_decoder", True, "false"),
        ("mpnet", "relative_attention_num_buckets", 16, "32"),
        ("mpnet", "pad_token_id", 0, "1"),
    ],
)
def test_a_computation_that_the_module_ignores_is_refused(changed, tmp_path, name, entry, value, supported):
    with pytest.raises(UnsupportedError, match=f"^{entry}: {str(value).lower()} in config.json is not supp") as error:
        load_model(str(changed(name, **{entry: value})), cache=tmp_path)
    assert error.value.hint == f"supported: {supported}"


def test_a_rope_that_changes_with_length_is_refused(changed, tmp_path):
    rope = {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}
    with pytest.raises(UnsupportedError, match="rope type 'yarn' of full_attention"):
        load_model(str(changed("modernbert", rope_parameters=rope)), cache=tmp_path)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads in config.json is 0"),
        ({"num_attention_heads": 5}, "config.json describes no model"),
        ({"hidden_size": 32}, "does not fit its config"),
        ({"num_hidden_layers": 4}, "lacks 16 of the"),
    ],
)
def test_a_config_of_another_model_is_refused(changed, tmp_path, entries, said):
    with pytest.raises(InputError, match=said):
        load_model(str(changed(**entries)), cache=tmp_path)


def test_weights_that_belong_to_no_part_are_refused(changed, tmp_path):
    with pytest.raises(InputError, match="holds 16 weights that its config has no place for"):
        load_model(str(changed(num_hidden_layers=2)), cache=tmp_path)


def test_without_a_tokenizer_no_text_can_be_read(changed, tmp_path):
    folder = changed()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        load_model(str(folder), cache=tmp_path)


def test_a_classifier_is_refused_with_the_name_of_its_encoder(changed, tmp_path):
    folder = changed(architectures=["BertForSequenceClassification"])
    with pytest.raises(UnsupportedError, match="BertForSequenceClassification is not supported") as error:
        load_model(str(folder), cache=tmp_path)
    assert error.value.hint == "save the encoder alone, as BertModel"
