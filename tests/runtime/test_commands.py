"""The commands that run a build, each in a process of its own where signals or start-up matter."""

import json
import re
import signal
import subprocess
import sys

import httpx
import openai
import pytest
from click.testing import CliRunner

from llmopt.optimizer.cli import chat, generate, serve
from llmopt.optimizer.errors import InputError, LlmoptError

PYTHON = [sys.executable, "-c", "from llmopt.optimizer.cli.main import main; main()"]


@pytest.fixture
def server(tiny_build):
    """A server process and its address."""
    process = subprocess.Popen(
        [*PYTHON, "serve", str(tiny_build), "--port", "0", "--threads", "1"], stderr=subprocess.PIPE, text=True
    )
    with process:
        url = re.search(r"http://\S+", process.stderr.readline())[0]
        yield process, url
        process.kill()


def wait_until_ready(url):
    with httpx.Client(trust_env=False) as http:
        while http.get(url + "/health").status_code != 200:
            pass


def test_serve_answers_the_openai_client_and_ends_in_good_order(server):
    process, url = server
    wait_until_ready(url)
    with openai.OpenAI(
        base_url=url + "/v1",
        api_key="none",
        http_client=httpx.Client(trust_env=False),
        _strict_response_validation=True,
    ) as ai:
        messages = [{"role": "user", "content": "hello"}]
        options = {"model": "build", "messages": messages, "temperature": 0, "max_tokens": 8}
        whole = ai.chat.completions.create(**options).choices[0].message.content
        streamed = [
            chunk.choices[0].delta.content or "" for chunk in ai.chat.completions.create(stream=True, **options)
        ]
        assert "".join(streamed) == whole
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_a_running_answer_is_finished_after_a_signal(server):
    process, url = server
    wait_until_ready(url)
    body = {"prompt": "The river", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(trust_env=False, timeout=20) as http,
        http.stream("POST", url + "/v1/completions", json=body) as response,
    ):
        pieces = response.iter_lines()
        first = next(pieces)
        process.send_signal(signal.SIGINT)
        assert [first, *pieces][-2:] == ["data: [DONE]", ""]
    assert process.wait(20) == 0


def test_serve_imports_no_torch_and_no_transformers(tiny_build):
    script = (
        "import sys; from pathlib import Path; import llmopt.runtime.server.serve, llmopt.runtime.build as b;"
        "b.open_build(Path(sys.argv[1]), threads=1);"
        "assert not {'torch', 'transformers', 'onnx', 'onnxscript'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(tiny_build)], check=True, timeout=60)


def test_serve_ends_with_the_error_that_kept_it_from_loading(tmp_path):
    ended = subprocess.run([*PYTHON, "serve", str(tmp_path), "--port", "0"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "is not a build" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_generate_continues_text_from_option_or_input(tiny_build):
    runner = CliRunner()
    options = [str(tiny_build), "--threads", "1", "--max-tokens", "20", "--temperature", "1", "--seed", "3"]
    by_option = runner.invoke(generate.command, [*options, "--prompt", "The river"])
    by_input = runner.invoke(generate.command, options, input="The river")
    assert by_option.exit_code == by_input.exit_code == 0
    assert by_option.stdout == by_input.stdout
    assert by_option.stdout.endswith("\n")


def test_chat_asks_one_question(tiny_build):
    options = [str(tiny_build), "--threads", "1", "--max-tokens", "20", "--temperature", "1", "--seed", "3"]
    asked = CliRunner().invoke(chat.command, [*options, "--prompt", "hello"])
    assert asked.exit_code == 0
    typed = CliRunner().invoke(chat.command, options, input="hello\n/quit\n")
    assert typed.stdout == asked.stdout


def test_chat_remembers_and_forgets(tiny_build):
    options = [str(tiny_build), "--threads", "1", "--max-tokens", "12", "--temperature", "1", "--seed", "3"]

    def answers(lines):
        result = CliRunner().invoke(chat.command, options, input="\n".join(lines))
        assert result.exit_code == 0, result.output
        return result.stdout

    first = answers(["hello"])
    assert answers(["hello", "/reset", "hello"]) == first * 2
    assert answers(["hello", "hello"]) != first * 2
    assert answers(["/system Be brief.", "hello"]) != first


def test_chat_says_what_does_not_fit_and_goes_on(tiny_build):
    result = CliRunner().invoke(
        chat.command, [str(tiny_build), "--threads", "1", "--context", "40"], input="x" * 200 + "\n/unknown\n/quit\n"
    )
    assert result.exit_code == 0
    assert "the context has 40 tokens" in result.stderr
    assert "/reset begins anew" in result.stderr


@pytest.mark.parametrize("module", [serve, chat, generate])
def test_options_out_of_range_are_usage_errors(module, tiny_build):
    assert CliRunner().invoke(module.command, [str(tiny_build), "--threads", "0"]).exit_code == 2


def run(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_generate_answers_a_file_of_prompts_and_goes_on_where_it_ended(tiny_build, tmp_path):
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(f'{{"id": "{i}", "prompt": "The river {i}"}}\n' for i in range(6)))
    arguments = (tiny_build, "--prompts", prompts, "--out", out, "--max-tokens", "5", "--threads", "1")
    first = run(generate.command, *arguments)
    assert (first.exit_code, first.stdout) == (0, "")
    assert "6 of 6 prompts answered" in first.stderr
    whole = out.read_text()
    assert [json.loads(line)["id"] for line in whole.splitlines()] == [str(i) for i in range(6)]
    out.write_text("".join(whole.splitlines(keepends=True)[:4]))
    again = run(generate.command, *arguments)
    assert "4 of 6 prompts were answered before" in again.stderr
    assert "2 of 2 prompts answered" in again.stderr
    assert out.read_text() == whole
    other = run(generate.command, *arguments, "--temperature", "1")
    assert isinstance(other.exception, InputError)
    assert out.read_text() == whole


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "x.jsonl"], "belong together"),
        (["--prompts", "x.jsonl", "--out", "y", "--prompt", "z"], "give one of them"),
        (["--prompts", "x.jsonl", "--out", "y"], "cannot be read"),
        (["--prompt", "x", "--speculate"], "--no-exact"),
        (["--prompt", "x", "--memory", "0.000001"], "GB of keys and values"),
    ],
)
def test_generate_says_what_does_not_go_together(tiny_build, arguments, words):
    error = run(generate.command, tiny_build, *arguments, "--threads", "1").exception
    assert isinstance(error, LlmoptError)
    assert words in f"{error.message} {error.hint}"


def test_a_server_that_cannot_have_its_memory_says_what_would_fit(tiny_build):
    options = ["--slots", "4", "--memory", "0.0001", "--port", "0"]
    command = [*PYTHON, "serve", str(tiny_build), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 7
    assert "4 slots of 256 tokens take" in done.stderr
    assert "what fits: --context" in done.stderr
    assert "Traceback" not in done.stderr
