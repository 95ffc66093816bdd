import pytest

from llmopt.optimizer.errors import InputError
from llmopt.runtime.build import open_build
from llmopt.runtime.conversation import speaking
from llmopt.runtime.sampler import Sampling

GREEDY = Sampling(temperature=0)


def test_an_answer_arrives_in_pieces_and_is_repeatable(tiny_build):
    with speaking(open_build(tiny_build, slots=1, threads=1)) as speaker:
        pieces = list(speaker.complete("The river", Sampling(temperature=1, seed=1), max_tokens=30))
        assert len(pieces) > 1
        assert pieces == list(speaker.complete("The river", Sampling(temperature=1, seed=1), max_tokens=30))


def test_a_chat_goes_through_the_template(tiny_build):
    build = open_build(tiny_build, slots=1, threads=1)
    message = [{"role": "user", "content": "hello"}]
    with speaking(build) as speaker:
        chatted = "".join(speaker.chat(message, GREEDY, max_tokens=20))
        assert chatted == "".join(
            speaker.complete(build.tokenizer.chat_template.render(message), GREEDY, max_tokens=20)
        )


def test_a_conversation_without_room_is_an_input_error(tiny_build):
    with speaking(open_build(tiny_build, context=4, threads=1)) as speaker:
        with pytest.raises(InputError, match="no room"):
            list(speaker.complete("one two three four", GREEDY, max_tokens=5))
        with pytest.raises(InputError, match="empty"):
            list(speaker.complete("", GREEDY, max_tokens=5))


def test_leaving_an_answer_frees_the_engine(tiny_build):
    sampling = Sampling(temperature=1, seed=1)
    with speaking(open_build(tiny_build, slots=1, threads=1)) as speaker:
        answer = speaker.complete("The river", sampling, max_tokens=200)
        next(answer)
        answer.close()
        assert "".join(speaker.complete("The river", sampling, max_tokens=20))
