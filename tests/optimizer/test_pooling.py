"""What the files of sentence-transformers say about pooling, and what they may not say."""

import json

import pytest

from llmopt.optimizer.errors import InputError, UnsupportedError
from llmopt.optimizer.pooling import Pooling, read_pooling


def write(folder, name, value):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path):
    """A model with mean pooling and normalization."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    write(tmp_path, "modules.json", [{"path": path, "type": f"st.models.{kind}"} for path, kind in kinds.items()])
    write(tmp_path, "1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    write(tmp_path, "sentence_bert_config.json", {"max_seq_length": 30, "do_lower_case": False})
    return tmp_path


def test_without_files_it_is_the_mean_and_not_normalized(tmp_path):
    assert read_pooling(tmp_path) == (Pooling(mode="mean", normalize=False, max_tokens=None, is_given=False), [])


def test_all_files_are_read_and_named(folder):
    found, names = read_pooling(folder)
    assert found == Pooling(mode="mean", normalize=True, max_tokens=30, is_given=True)
    assert names == ["modules.json", "sentence_bert_config.json", "1_Pooling/config.json"]


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}, "max"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len_tokens"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["max"], "embedding_dimension": 8}, "max"),
        ({"word_embedding_dimension": 8}, "mean"),
    ],
)
def test_a_mode_is_read_in_both_spellings(folder, config, mode):
    write(folder, "1_Pooling/config.json", config)
    assert read_pooling(folder)[0].mode == mode


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "asks for pooling by cls and mean"),
        ({"pooling_mode_weightedmean_tokens": True}, "asks for pooling by weightedmean"),
        ({"pooling_mode": "median"}, "asks for pooling by median"),
        ({"pooling_mode": "mean", "include_prompt": False}, "leaves the prompt out"),
    ],
)
def test_other_pooling_is_refused(folder, config, said):
    write(folder, "1_Pooling/config.json", config)
    with pytest.raises(UnsupportedError, match=said):
        read_pooling(folder)


def test_two_spellings_that_differ_are_a_contradiction(folder):
    write(folder, "1_Pooling/config.json", {"pooling_mode": "mean", "pooling_mode_cls_token": True})
    with pytest.raises(InputError, match="says pooling_mode mean and cls"):
        read_pooling(folder)


def test_a_module_that_no_engine_computes_is_refused(folder):
    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    write(folder, "modules.json", [{"path": str(i), "type": kind} for i, kind in enumerate(kinds)])
    with pytest.raises(UnsupportedError, match="lists Transformer, Pooling, Dense, Normalize"):
        read_pooling(folder)


def test_texts_that_are_lowercased_outside_of_the_tokenizer_are_refused(folder):
    write(folder, "sentence_bert_config.json", {"do_lower_case": True})
    with pytest.raises(UnsupportedError, match="do_lower_case"):
        read_pooling(folder)


@pytest.mark.parametrize("length", [0, "long"])
def test_a_length_that_is_no_number_of_tokens_is_refused(folder, length):
    write(folder, "sentence_bert_config.json", {"max_seq_length": length})
    with pytest.raises(InputError, match="max_seq_length"):
        read_pooling(folder)


def test_prompts_are_read_with_the_name_of_the_default(folder):
    prompts = {"query": "query: ", "passage": "passage: "}
    write(folder, "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": "passage"})
    found, names = read_pooling(folder)
    assert (found.prompts, found.default_prompt) == (prompts, "passage")
    assert "config_sentence_transformers.json" in names


def test_a_default_prompt_that_is_not_there_is_refused(folder):
    write(folder, "config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": "query"})
    with pytest.raises(InputError, match="default_prompt_name"):
        read_pooling(folder)


@pytest.mark.parametrize("text", ["{", '{"a": 1}', '[{"type": "x"}]'])
def test_a_damaged_list_of_modules_is_refused(folder, text):
    (folder / "modules.json").write_text(text)
    with pytest.raises(InputError, match="is no list of modules"):
        read_pooling(folder)


def test_a_missing_config_of_the_pooling_is_refused(folder):
    (folder / "1_Pooling/config.json").unlink()
    with pytest.raises(InputError, match="does not exist"):
        read_pooling(folder)
