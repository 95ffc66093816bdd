import json
import threading
import time

import httpx
import pytest

from llmopt.optimizer.errors import InputError
from llmopt.runtime.backends.base import ExecutionError
from llmopt.runtime.engine import QueueLimits
from llmopt.runtime.server import service as service_module
from llmopt.runtime.server.serve import bind
from llmopt.runtime.server.service import Conduct

COMPLETION = "/v1/completions"
CHAT = "/v1/chat/completions"


def test_health_models_and_version_answer(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 512
    assert client.get("/version").json()["fingerprint"] == "fp_toy"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("GET", "/nothing", None, 404, None),
        ("GET", COMPLETION, None, 405, None),
        ("GET", "/v1/models/other", None, 404, "model"),
        ("POST", COMPLETION, b"{", 400, None),
        ("POST", COMPLETION, b"\xff", 400, None),
        ("POST", COMPLETION, b"[]", 400, None),
        ("POST", COMPLETION, b'{"prompt": "x", "model": "other"}', 404, "model"),
        ("POST", COMPLETION, b'{"prompt": [300]}', 400, "prompt"),
        ("POST", COMPLETION, b'{"prompt": [-1]}', 400, "prompt"),
        ("POST", COMPLETION, b'{"prompt": [[]]}', 400, "prompt"),
        ("POST", COMPLETION, b'{"prompt": ["x", ""]}', 400, "prompt"),
        ("POST", COMPLETION, b'{"prompt": "x", "max_tokens": 512}', 400, "max_tokens"),
        ("POST", COMPLETION, b'{"prompt": "x", "logit_bias": {"300": 1}}', 400, "logit_bias"),
        ("POST", COMPLETION, b'{"prompt": "x", "logit_bias": {"x": 1}}', 400, "logit_bias"),
        ("POST", COMPLETION, b'{"prompt": "x", "stop_token_ids": [258]}', 400, "stop_token_ids"),
        ("POST", CHAT, b'{"messages": [{"role": "tool", "content": "x"}]}', 400, None),
        ("POST", CHAT, b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', 400, "messages"),
    ],
)
def test_errors_have_the_shape_of_the_api(client, method, path, body, status, param):
    response = client.request(method, path, content=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_text_parts_are_joined(client):
    whole = {"role": "user", "content": "a\nb"}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    answers = [
        client.post(CHAT, json={"messages": [m], "temperature": 0, "max_tokens": 5}).json() for m in (whole, parts)
    ]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_a_stream_is_server_sent_events(client):
    response = client.post(CHAT, json={"messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 3})
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0][6:])["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_an_answer_does_not_depend_on_what_else_runs(served):
    def ask(i):
        with served.client() as client:
            body = {"prompt": f"question {i % 5}", "seed": i % 5, "max_tokens": 30}
            answers[i] = client.post(COMPLETION, json=body).json()["choices"][0]["text"]

    answers = {}
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(20):
        assert answers[i] == answers[i % 5]
    assert len(set(answers.values())) == 5


def leave_waiting(client, body):
    with pytest.raises(httpx.TimeoutException):
        client.post(COMPLETION, json=body, timeout=0.05)


def leave_streaming(client, body):
    with client.stream("POST", COMPLETION, json=body | {"stream": True}) as response:
        next(response.iter_text())


@pytest.mark.parametrize("leave", [leave_waiting, leave_streaming])
def test_a_client_that_leaves_frees_its_slots(toy_server, leave):
    def slow(kind, slots):
        time.sleep(0.01)

    with toy_server(slots=1, before_run=slow) as served, served.client() as client:
        for _ in range(10):
            leave(client, {"prompt": "x", "max_tokens": 500, "ignore_eos": True})
        answer = client.post(COMPLETION, json={"prompt": "y", "max_tokens": 2})
        assert answer.status_code == 200
        assert served.service.engine.statistics.running == 0


def test_a_failed_run_is_an_error_of_its_request_alone(toy_server):
    def fail(kind, slots):
        if kind == "decode" and failing.is_set():
            raise ExecutionError("broken")

    failing = threading.Event()
    failing.set()
    with toy_server(before_run=fail) as served, served.client() as client:
        response = client.post(COMPLETION, json={"prompt": "x", "max_tokens": 5})
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "internal_server_error"
        streamed = client.post(COMPLETION, json={"prompt": "x", "max_tokens": 5, "stream": True, "ignore_eos": True})
        last = [part for part in streamed.text.split("\n\n") if part][-1]
        assert json.loads(last[6:])["error"]["message"] == "broken"
        failing.clear()
        assert client.post(COMPLETION, json={"prompt": "x", "max_tokens": 5}).status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_is_unhealthy(toy_server):
    def bug(kind, slots):
        raise ZeroDivisionError("a bug")

    with toy_server(before_run=bug) as served, served.client() as client:
        assert client.post(COMPLETION, json={"prompt": "x"}).status_code == 500
        while client.get("/health").status_code == 200:
            pass
        response = client.get("/health")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "dead")
        assert response.headers["retry-after"]
        assert client.post(COMPLETION, json={"prompt": "x"}).status_code == 503


def test_a_stuck_engine_is_unhealthy(toy_server, monkeypatch):
    monkeypatch.setattr(service_module, "STUCK_AFTER", 0.05)
    go = threading.Event()
    with toy_server(before_run=lambda kind, slots: go.wait(10)) as served, served.client() as client:
        asking = threading.Thread(target=client.post, args=(COMPLETION,), kwargs={"json": {"prompt": "x"}})
        asking.start()
        with served.client() as other:
            while (response := other.get("/health")).status_code == 200:
                pass
            assert response.json()["error"]["code"] == "stuck"
            go.set()
            asking.join()
            assert other.get("/health").status_code == 200


def test_too_many_unfinished_sequences_are_refused(toy_server):
    conduct = Conduct(limits=QueueLimits(requests=3))
    with toy_server(service={"conduct": conduct}) as served, served.client() as client:
        response = client.post(COMPLETION, json={"prompt": "x", "n": 4, "stream": True})
        assert response.status_code == 429
        assert response.headers["retry-after"]
        assert client.post(COMPLETION, json={"prompt": "x", "n": 3}).status_code == 200


def test_a_request_that_takes_too_long_ends_with_a_timeout(toy_server):
    def slow(kind, slots):
        time.sleep(0.02)

    body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}
    conduct = Conduct(timeout=0.2)
    with toy_server(before_run=slow, service={"conduct": conduct}) as served, served.client() as client:
        response = client.post(COMPLETION, json=body)
        assert (response.status_code, response.json()["error"]["type"]) == (504, "timeout_error")
        streamed = client.post(COMPLETION, json=body | {"stream": True})
        last = [part for part in streamed.text.split("\n\n") if part][-1]
        assert json.loads(last[6:])["error"]["code"] == "timeout"


def test_tokens_of_a_shared_beginning_are_reported(client):
    body = {"prompt": "the same beginning of all that follows, ", "max_tokens": 3, "ignore_eos": True}
    client.post(COMPLETION, json=body)
    again = client.post(COMPLETION, json=body | {"prompt": body["prompt"] + "and something else"}).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == len(body["prompt"])
    other = client.post(COMPLETION, json=body | {"cache_salt": "another"}).json()
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_server_is_unhealthy_while_it_loads(toy_server):
    go = threading.Event()
    with toy_server(before_load=lambda: go.wait(10), wait=False) as served, served.client() as client:
        for path in ("/health", "/v1/models", "/version"):
            response = client.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
        assert client.post(COMPLETION, json={"prompt": "x"}).status_code == 503
        go.set()
        while client.get("/health").status_code != 200:
            pass


def test_an_address_in_use_is_an_input_error():
    with bind("127.0.0.1", 0) as sock, pytest.raises(InputError, match="cannot listen"):
        bind("127.0.0.1", sock.getsockname()[1])


def test_metrics_count_what_was_done(toy_server):
    with toy_server() as served, served.client() as client:
        for _ in range(2):
            client.post(COMPLETION, json={"prompt": "x" * 40, "max_tokens": 3, "ignore_eos": True})
        response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    label = '{model_name="toy"}'
    assert float(lines[f"vllm:prompt_tokens_total{label}"]) == 80
    assert float(lines[f"vllm:prefix_cache_hits_total{label}"]) == 38
    assert float(lines[f"vllm:generation_tokens_total{label}"]) == 6
    assert float(lines[f"vllm:time_to_first_token_seconds_count{label}"]) == 2
    assert float(lines[f"vllm:inter_token_latency_seconds_count{label}"]) == 4
    assert float(lines['vllm:request_success_total{finished_reason="length",model_name="toy"}']) == 2
    assert float(lines[f"vllm:num_requests_running{label}"]) == 0


def test_an_answer_obeys_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yy"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": form, "max_tokens": 200, "seed": 1}
    choice = client.post(CHAT, json=body).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert json.loads(choice["message"]["content"])["a"] in ("x", "yy")


def test_answers_of_one_request_are_guided_each_for_itself(client):
    body = {"prompt": "x", "n": 4, "seed": 3, "max_tokens": 20, "structured_outputs": {"choice": ["left", "right"]}}
    choices = client.post(COMPLETION, json=body).json()["choices"]
    assert {choice["text"] for choice in choices} <= {"left", "right"}
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
