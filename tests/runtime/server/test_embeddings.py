"""Vectors over HTTP, as OpenAI's own client asks for them."""

import base64
import threading
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from llmopt.optimizer.build import build
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.progress import Silent
from llmopt.optimizer.recipe import Recipe
from llmopt.runtime.build import holds_encoder
from llmopt.runtime.encoder import Encoder
from llmopt.runtime.server import embeddings
from llmopt.runtime.server.app import create_app
from llmopt.runtime.server.embeddings import EmbeddingService
from llmopt.runtime.server.serve import Server, bind

TEXTS = ["The river comes down.", "Rome", "A fox, a clock, and an old newspaper."]
RECIPE = """\
version: 1
model: {model}
passes: []
export: [onnx]
accept: [{{metric: cosine, min: 0.9, data: texts.txt, windows: 3, tokens: 30}}]
"""


@pytest.fixture(scope="module")
def encoder(encoder_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    model = encoder_of("bert", num_hidden_layers=1, pooling="pooling_mode_mean_tokens")
    (folder / "recipe.yaml").write_text(RECIPE.format(model=model), encoding="utf-8")
    build(Recipe.load(folder / "recipe.yaml"), folder / "build", cache=folder / "cache", progress=Silent())
    assert holds_encoder(folder / "build")
    return Encoder(folder / "build", threads=1)


@contextmanager
def serving(load, *, wait=True):
    import uvicorn

    service = EmbeddingService(load, model_name="tiny")
    sock = bind("127.0.0.1", 0)
    config = uvicorn.Config(create_app(service), log_level="warning", lifespan="on", timeout_graceful_shutdown=5)
    server = Server(config)
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", timeout=20, trust_env=False) as client:
            while wait and client.get("/health").status_code != 200:
                pass
            yield client
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def http(encoder):
    with serving(lambda: encoder) as client:
        yield client


@pytest.fixture
def openai(http):
    with OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_vectors_are_those_of_the_build(openai, encoder):
    answer = openai.embeddings.create(model="tiny", input=TEXTS)  # the client asks for base64
    assert [each.index for each in answer.data] == [0, 1, 2]
    found = np.array([each.embedding for each in answer.data], np.float32)
    assert np.array_equal(found, encoder.encode(TEXTS))
    tokens = sum(encoder.encode_counted(TEXTS).tokens)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens, answer.model) == (tokens, tokens, "tiny")


def test_one_text_is_a_list_of_one(openai, encoder):
    answer = openai.embeddings.create(model="tiny", input=TEXTS[0], encoding_format="float")
    assert np.array_equal(np.array(answer.data[0].embedding, np.float32), encoder.encode(TEXTS[0])[0])


def test_both_formats_are_the_same_numbers(http):
    forms = {}
    for form in ("float", "base64"):
        answer = http.post("/v1/embeddings", json={"input": "Rome", "encoding_format": form}).json()
        forms[form] = answer["data"][0]["embedding"]
    decoded = np.frombuffer(base64.b64decode(forms["base64"]), "<f4")
    assert np.array_equal(decoded, np.array(forms["float"], np.float32))


@pytest.mark.parametrize("many", [False, True])
def test_token_ids_are_taken_as_they_are(openai, encoder, many):
    ids = [0, 40, 41, 2]
    answer = openai.embeddings.create(model="tiny", input=[ids, ids] if many else ids)
    assert len(answer.data) == 1 + many
    assert np.array_equal(np.array(answer.data[0].embedding, np.float32), encoder.encode([ids])[0])
    assert answer.usage.total_tokens == 4 * len(answer.data)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"input": []}, "input is an empty list"),
        ({"input": "word " * 100}, "the model takes 64"),
        ({"input": [[700]]}, "token ids go from 0 to 511"),
        ({"input": "Rome", "dimensions": 32}, "vectors have 64 dimensions"),
        ({"input": "Rome", "prompt_name": "query"}, "no prompt 'query'"),
        ({"input": 5}, "input"),
        ({"input": "Rome", "encoding_format": "hex"}, "encoding_format"),
        ({}, "input"),
    ],
)
def test_what_cannot_be_answered_is_refused(http, body, said):
    answer = http.post("/v1/embeddings", json=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_the_client_sees_its_own_errors(openai):
    with pytest.raises(BadRequestError, match="empty list"):
        openai.embeddings.create(model="tiny", input=[])
    with pytest.raises(NotFoundError, match="no model 'other'"):
        openai.embeddings.create(model="other", input="Rome")


def test_the_model_and_its_build_are_described(http, openai, encoder):
    (model,) = openai.models.list().data
    assert (model.id, model.model_dump()["max_model_len"]) == ("tiny", 64)
    told = http.get("/version").json()
    assert (told["fingerprint"], told["verdict"]) == (encoder.fingerprint, "accepted")


def test_an_encoder_answers_no_chat(http):
    assert http.post("/v1/chat/completions", json={"messages": []}).status_code == 404


def test_many_requests_at_once_get_their_own_vectors(http, encoder):
    expected = {text: encoder.encode(text)[0] for text in TEXTS}
    found = {}

    def ask(number):
        text = TEXTS[number % 3]
        vector = http.post("/v1/embeddings", json={"input": text}).json()["data"][0]["embedding"]
        found[number] = np.array_equal(np.array(vector, np.float32), expected[text])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(12), True)


def test_too_many_texts_are_told_to_come_again(encoder, monkeypatch):
    monkeypatch.setattr(embeddings, "MAX_WAITING", 2)
    with serving(lambda: encoder) as client:
        answer = client.post("/v1/embeddings", json={"input": TEXTS})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert client.post("/v1/embeddings", json={"input": TEXTS[:2]}).status_code == 200


def test_while_it_loads_it_says_so(encoder):
    loaded = threading.Event()

    def load():
        loaded.wait(20)
        return encoder

    with serving(load, wait=False) as client:
        assert client.get("/health").status_code == 503
        answer = client.post("/v1/embeddings", json={"input": "Rome"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        loaded.set()
        while client.get("/health").status_code != 200:
            pass
        assert client.post("/v1/embeddings", json={"input": "Rome"}).status_code == 200


def test_a_build_that_cannot_be_opened_is_told():
    def load():
        raise InputError("no build here")

    with serving(load, wait=False) as client:
        while client.get("/health").json()["error"]["code"] != "failed":
            pass
        assert "no build here" in client.get("/v1/models").json()["error"]["message"]
