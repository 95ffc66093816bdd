import json

import pytest

from llmopt.benchmarks.load.events import read_answer

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
CLOSED = HEAD + b"connection: close\r\n\r\n"


def event(text: str, finish: str | None = None, *, end: str = "\n\n") -> bytes:
    return f"data: {json.dumps({'choices': [{'text': text, 'finish_reason': finish}]})}{end}".encode()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def test_every_piece_of_text_has_the_time_at_which_it_came():
    parts = [(1.0, CLOSED), (2.0, event("a")), (3.0, event("b") + event("c", "length")), (4.0, b"data: [DONE]\n\n")]
    found = read_answer(0.5, parts)
    assert found.begun == 0.5
    assert found.times == (2.0, 3.0, 3.0)
    assert found.finish == "length"
    assert found.error is None


def test_the_sizes_of_chunks_are_no_content():
    parts = [(1.0, CHUNKED + chunk(event("a"))), (2.0, chunk(event("b", "length"))), (3.0, b"0\r\n\r\n")]
    assert read_answer(0, parts).times == (1.0, 2.0)


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_bytes_may_be_cut_anywhere(size):
    whole = CHUNKED + chunk(event("a", end="\r\n\r\n")) + chunk(event("ü", "length")) + b"0\r\n\r\n"
    parts = [(float(at), whole[at : at + size]) for at in range(0, len(whole), size)]
    found = read_answer(0, parts)
    assert len(found.times) == 2
    assert found.times[0] < found.times[1]
    assert found.finish == "length"


def test_events_without_text_count_for_nothing():
    parts = [(1.0, CLOSED), (2.0, event("a")), (3.0, b": ping\n\n"), (4.0, event("", "length"))]
    found = read_answer(0, parts)
    assert found.times == (2.0,)
    assert found.finish == "length"


def test_an_answer_that_was_cut_off_has_no_finish():
    found = read_answer(0, [(1.0, CLOSED), (2.0, event("a") + event("b")[:10])])
    assert found.times == (2.0,)
    assert found.finish is None


def test_no_answer_at_all_is_no_error():
    found = read_answer(3.0, [])
    assert found.times == ()
    assert found.error is None


def test_a_refusal_is_an_error_in_the_servers_words():
    body = json.dumps({"error": {"message": "the context is full"}}).encode()
    head = f"HTTP/1.1 400 Bad Request\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    assert read_answer(0, [(1.0, head + body)]).error == "the context is full"
    assert read_answer(0, [(1.0, b"HTTP/1.1 500 Oops\r\n\r\nit broke")]).error == "it broke"


def test_an_error_within_a_stream_is_one():
    parts = [(1.0, CLOSED), (2.0, event("a")), (3.0, b'data: {"error": {"message": "it broke"}}\n\n')]
    found = read_answer(0, parts)
    assert found.error == "it broke"
    assert found.times == (2.0,)
