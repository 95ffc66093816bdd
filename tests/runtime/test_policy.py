import shutil

import pytest

from llmopt.optimizer.errors import InputError
from llmopt.optimizer.manifest import Manifest
from llmopt.runtime.build import open_build
from llmopt.runtime.llm import LLM, Options
from llmopt.runtime.policy import Choices, default_policy, policy_for
from llmopt.runtime.text import Tokenizer


@pytest.fixture(scope="module")
def varying_build(tiny_build, tmp_path_factory):
    """A build whose engine does not promise to be exact."""
    copy = tmp_path_factory.mktemp("varying") / "build"
    shutil.copytree(tiny_build, copy)
    manifest = Manifest.load(copy)
    engine = manifest.engines[0].model_copy(update={"batch_invariant": False})
    (copy / "manifest.json").write_text(manifest.model_copy(update={"engines": [engine]}).model_dump_json())
    return copy


def test_an_engine_is_as_exact_as_it_can_be(tiny_build, varying_build, caplog):
    caplog.set_level("INFO")
    assert default_policy(open_build(tiny_build, threads=1)).is_exact
    assert "answers do not depend on what else runs" in caplog.text
    assert not default_policy(open_build(varying_build, threads=1)).is_exact
    assert "answers may depend" in caplog.text


def test_what_cannot_be_promised_cannot_be_asked_for(varying_build):
    with pytest.raises(InputError, match="cannot promise"):
        policy_for(open_build(varying_build, threads=1), Choices(exact=True))


def test_a_draft_of_the_same_vocabulary_changes_no_greedy_answer(tiny_build, tiny_float_build):
    options = Options(max_tokens=40, ignore_eos=True)
    prompts = ["The river", "A mountain and a valley"]
    with LLM(tiny_float_build, slots=1, threads=1) as llm:
        plain = llm.generate(prompts, options)
    choices = Choices(exact=False, draft=tiny_build, draft_tokens=3, threads=1)
    with LLM(tiny_float_build, slots=1, threads=1, choices=choices) as llm:
        assert [each.tokens for each in llm.generate(prompts, options)] == [each.tokens for each in plain]
        counted = llm.engine.statistics
        assert 0 < counted.accepted_tokens <= counted.drafted_tokens


def test_a_draft_of_another_vocabulary_is_refused(tiny_build, monkeypatch):
    monkeypatch.setattr(Tokenizer, "has_vocabulary_of", lambda self, other: False)
    build = open_build(tiny_build, threads=1)
    with pytest.raises(InputError, match="another vocabulary"):
        policy_for(build, Choices(exact=False, draft=tiny_build, threads=1))


def test_answers_of_a_second_turn_are_shared_where_exactness_is_not_asked_for(tiny_build):
    ids = list(range(5, 45))
    with LLM(tiny_build, slots=1, threads=1, choices=Choices(exact=False)) as llm:
        (first,) = llm.generate([ids], Options(max_tokens=20, ignore_eos=True))
        (second,) = llm.generate([[*ids, *first.tokens, 7, 8]], Options(max_tokens=2))
    assert second.cached_tokens == len(ids) + 19
