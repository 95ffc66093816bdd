import json

import pytest

from llmopt.optimizer.errors import InputError
from llmopt.runtime import LLM, Options
from llmopt.runtime.prompt_file import AnswerFile, answer_all, read_prompts


@pytest.fixture(scope="module")
def llm(tiny_build):
    with LLM(tiny_build, slots=3, threads=1) as opened:
        yield opened


@pytest.fixture
def prompts(tmp_path):
    lines = [
        {"id": "a", "prompt": "The river"},
        {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3},
        {"id": "c", "turns": ["first", "second", "third"]},
        {"ids": [5, 6, 7]},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


OPTIONS = Options(max_tokens=6, ignore_eos=True)


def answered(llm, path, out, settings=OPTIONS):
    asked = read_prompts(path)
    file = AnswerFile(out, asked, {"options": settings})
    for news in answer_all(llm, [each for each in asked if each.line not in file.done], OPTIONS):
        if not isinstance(news, int):
            file.add(*news)
    file.close()
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_every_prompt_is_answered_in_its_place(llm, prompts, tmp_path):
    found = answered(llm, prompts, tmp_path / "new/out.jsonl")
    assert [(entry["line"], entry["id"]) for entry in found] == [(1, "a"), (2, 2), (3, "c"), (4, 4)]
    assert [entry["completion_tokens"] for entry in found] == [6, 3, 6, 6]
    assert len(found[2]["turns"]) == 3
    assert found[2]["text"] == found[2]["turns"][-1]
    (first,) = llm.generate(["The river"], OPTIONS)
    assert (found[0]["text"], found[0]["finish_reason"]) == (first.text, "length")


def test_turns_are_answered_in_view_of_what_was_said(llm, prompts, tmp_path):
    turns = answered(llm, prompts, tmp_path / "out.jsonl")[2]["turns"]
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": turns[0]},
        {"role": "user", "content": "second"},
    ]
    assert llm.generate([messages], OPTIONS)[0].text == turns[1]


def test_what_was_answered_is_not_asked_again(llm, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    whole = answered(llm, prompts, out)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text(lines[0] + lines[2] + lines[3][:20])  # killed in the middle of a line
    file = AnswerFile(out, read_prompts(prompts), {"options": OPTIONS})
    assert file.done == {1, 3}
    assert answered(llm, prompts, out) == whole


def test_answers_of_other_settings_are_not_mixed(llm, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    answered(llm, prompts, out)
    before = out.read_bytes()
    with pytest.raises(InputError, match="other settings"):
        answered(llm, prompts, out, settings="others")
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "2: not JSON"),
        ("[]", "2: the line has no prompt"),
        ('{"prompt": ""}', "2: prompt is empty"),
        ('{"prompt": 5}', "2: prompt is empty or not"),
        ('{"turns": "x"}', "2: turns"),
        ('{"prompt": "a", "ids": [1]}', "2: the line has prompt and ids"),
        ('{"prompt": "a", "max_tokens": 0}', "2: max_tokens"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, line, words):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(InputError) as caught:
        read_prompts(path)
    assert f"{path}:{words}" in caught.value.message


def test_files_without_prompts_are_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(path)
    path.write_text("\n\n")
    with pytest.raises(InputError, match="no prompts"):
        read_prompts(path)


def test_a_prompt_that_does_not_fit_is_named_before_anything_runs(llm, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + json.dumps({"ids": [5] * 300}))
    before = llm.engine.statistics.steps
    with pytest.raises(InputError, match="line 2: the context has"):
        answered(llm, path, tmp_path / "out.jsonl")
    assert llm.engine.statistics.steps == before
