import json

import pytest

from llmopt.benchmarks.load.trace import Trace
from llmopt.benchmarks.load.workload import Workload, read_workload
from llmopt.optimizer.errors import InputError
from llmopt.runtime.text import Tokenizer

TRACE = Trace((0.0, 1.0, 2.0), (30, 40, 50), (5, 6, 7))


@pytest.fixture
def workload(byte_tokenizer):
    return Workload(TRACE, ["What is that?", "Why?"], Tokenizer(byte_tokenizer))


def test_prompts_have_the_lengths_of_the_trace(workload):
    jobs = workload.take(4)
    assert [job.prompt_tokens for job in jobs] == [30, 40, 50, 30]
    assert [job.max_tokens for job in jobs] == [5, 6, 7, 5]
    assert all(len(job.prompt.encode()) == job.prompt_tokens for job in jobs)


def test_no_two_prompts_begin_alike(workload):
    prompts = [job.prompt for job in (*workload.take(5), *workload.take(5))]
    assert len({prompt.split(".")[0] for prompt in prompts}) == 10


def test_jobs_behind_a_prefix_share_it_and_nothing_more(workload):
    one, other = (workload.job(20, 3, behind="The same for both. ") for _ in range(2))
    assert one.prompt.startswith("The same for both. ")
    assert other.prompt.startswith("The same for both. ")
    assert one.prompt != other.prompt
    assert one.prompt_tokens == len("The same for both. ") + 20


def test_a_character_that_a_cut_goes_through_is_left_out(byte_tokenizer):
    workload = Workload(TRACE, ["é" * 50], Tokenizer(byte_tokenizer))
    for tokens in (20, 21):
        job = workload.job(tokens, 1)
        assert "\ufffd" not in job.prompt
        assert tokens - 1 <= job.prompt_tokens <= tokens


def test_texts_and_trace_are_read_from_the_folder_of_data(tmp_path, byte_tokenizer):
    (tmp_path / "load_azure_conv").mkdir()
    rows = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,37,44\n"
    (tmp_path / "load_azure_conv/azure_conv.csv").write_text(rows, encoding="utf-8")
    (tmp_path / "chat_one").mkdir()
    line = json.dumps({"id": 1, "turns": ["Who are you?", "And who am I?"]})
    (tmp_path / "chat_one/prompts.jsonl").write_text(f"{line}\n", encoding="utf-8")
    (job,) = read_workload(tmp_path, Tokenizer(byte_tokenizer)).take(1)
    assert job.prompt.startswith("1. And who am I?\nWho are you?\n")


def test_a_folder_without_prompts_is_refused(tmp_path, byte_tokenizer):
    with pytest.raises(InputError, match=r"prompts\.jsonl"):
        read_workload(tmp_path, Tokenizer(byte_tokenizer))
