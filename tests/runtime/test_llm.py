import numpy as np
import pytest

from llmopt.optimizer.errors import InputError, LlmoptError
from llmopt.runtime import LLM, Options
from llmopt.runtime.sampler import Sampling
from llmopt.runtime.structured.grammar import Constraint

SAMPLED = Sampling(temperature=1, seed=1, logprobs=2)


@pytest.fixture(scope="module")
def llm(tiny_build):
    with LLM(tiny_build, slots=3, threads=1) as opened:
        yield opened


def test_answers_come_in_the_order_of_their_prompts_and_are_repeatable(llm):
    prompts = [f"The river number {i}" for i in range(10)]
    options = Options(max_tokens=12, sampling=SAMPLED)
    answers = llm.generate(prompts, options)
    assert [answer.prompt_tokens for answer in answers] == [
        len(llm.build.tokenizer.encode(prompt, add_special_tokens=True)) for prompt in prompts
    ]
    assert [answer.tokens for answer in answers] == [llm.generate([p], options)[0].tokens for p in prompts]
    assert all(len(answer.logprobs) == len(answer.tokens) for answer in answers)
    assert all(answer.text for answer in answers)


def test_an_answer_arrives_in_pieces(llm):
    pieces = list(llm.stream(["The river"], Options(max_tokens=30, sampling=SAMPLED, ignore_eos=True)))
    assert len(pieces) == 30
    assert pieces[-1].answer.text == "".join(piece.text for piece in pieces)
    assert [piece.answer for piece in pieces[:-1]] == [None] * 29


def test_more_prompts_than_the_engine_is_given_at_once(llm, monkeypatch):
    monkeypatch.setattr("llmopt.runtime.llm._AHEAD", 1)
    answers = llm.generate((f"prompt {i}" for i in range(20)), Options(max_tokens=2))
    assert len(answers) == 20


def test_a_conversation_goes_through_the_template(llm):
    messages = [{"role": "user", "content": "hello"}]
    rendered = llm.build.tokenizer.encode(llm.build.tokenizer.chat_template.render(messages), add_special_tokens=False)
    chatted, continued = llm.generate([messages, rendered], Options(max_tokens=8))
    assert chatted.tokens == continued.tokens


def test_token_ids_are_taken_as_they_are(llm):
    ids = np.arange(5, 25)
    first, second = llm.generate([ids.tolist(), tuple(ids)], Options(max_tokens=4))
    assert first.tokens == second.tokens
    assert first.prompt_tokens == 20


def test_each_prompt_may_have_its_own_options(llm):
    lengths = [3, 7, 1]
    options = [Options(max_tokens=length, ignore_eos=True) for length in lengths]
    found = {piece.index: piece.answer for piece in llm.stream(["a", "b", "c"], options) if piece.answer}
    assert [len(found[i].tokens) for i in range(3)] == lengths


def test_answers_obey_a_constraint(llm):
    options = Options(max_tokens=60, sampling=SAMPLED, constraint=Constraint("choice", '["left", "right"]'))
    assert {answer.text for answer in llm.generate(["a", "b", "c"], options)} <= {"left", "right"}


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("", "empty"), ([], "empty"), ([10**6], "the prompt has token"), ("a " * 300, "the context has")],
)
def test_a_prompt_that_cannot_run_is_refused_and_named(llm, prompt, words):
    with pytest.raises(InputError, match="prompt 1: ") as caught:
        llm.generate(["fine", prompt], Options(max_tokens=5))
    assert words in caught.value.message
    assert llm.generate(["still there"], Options(max_tokens=2))


def test_an_answer_may_yield_to_the_context(llm):
    prompt = [5] * 250
    (answer,) = llm.generate([prompt], Options(max_tokens=50, yields=True, ignore_eos=True))
    assert len(answer.tokens) == 6
    (answer,) = llm.generate([prompt], Options(max_tokens=None, ignore_eos=True))
    assert len(answer.tokens) == 6


def test_leaving_early_frees_the_engine(llm):
    pieces = llm.stream(["The river"] * 5, Options(max_tokens=200, ignore_eos=True))
    next(pieces)
    pieces.close()
    assert llm.generate(["The river"], Options(max_tokens=2))
    assert (llm.engine.statistics.running, llm.engine.statistics.waiting) == (0, 0)


def test_an_engine_that_is_stopped_says_so(tiny_build):
    llm = LLM(tiny_build, slots=1, threads=1)
    pieces = llm.stream(["The river"], Options(max_tokens=200, ignore_eos=True))
    next(pieces)
    llm.close()
    with pytest.raises(LlmoptError, match="stopped"):
        list(pieces)
