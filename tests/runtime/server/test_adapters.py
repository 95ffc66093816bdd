"""Adapters as models of their own: chosen by name, loaded and unloaded by whoever has the key."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

from llmopt.optimizer.lora.adapter_file import ModuleFactors, write_adapter
from llmopt.optimizer.lora.fitting import Fitted
from llmopt.runtime.server.service import Conduct

KEY = "a key"
ADMIN = {"Authorization": f"Bearer {KEY}"}


def factors(number):
    return {"toy": ModuleFactors(np.array([[number]], np.float32), np.zeros((1, 1), np.float32))}


@pytest.fixture
def catalogue(tmp_path):
    return {
        name: write_adapter(name, tmp_path / f"{name}.safetensors", factors(number))
        for number, name in enumerate(("support", "french", "small"), start=1)
    }


@pytest.fixture
def adapted_server(toy_server, catalogue):
    """``adapted_server(**backend)``: three adapters, of which two fit in memory, and an admin key."""
    return lambda **backend: toy_server(
        adapters=2, catalogue=catalogue, service={"conduct": Conduct(admin_key=KEY)}, **backend
    )


def ask(client, model, prompt="hello"):
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 8}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return answer.json()["choices"][0]["text"]


def test_adapters_are_models_whose_parent_is_the_base(adapted_server):
    with adapted_server() as served, served.client() as client:
        listed = client.get("/v1/models").json()["data"]
        assert [(each["id"], each.get("parent")) for each in listed] == [
            ("toy", None), ("french", "toy"), ("small", "toy"), ("support", "toy"),
        ]  # fmt: skip
        assert client.get("/v1/models/french").json()["parent"] == "toy"
        missing = client.post("/v1/completions", json={"model": "frensh", "prompt": "x"})
        assert missing.status_code == 404
        assert "'french'" in missing.json()["error"]["message"]


def test_the_openai_client_chooses_among_adapters_in_parallel(adapted_server):
    with adapted_server(slots=4) as served:
        client = openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)

        def chat(model):
            message = {"role": "user", "content": "hello"}
            answer = client.chat.completions.create(model=model, messages=[message], temperature=0, max_tokens=8)
            return answer.choices[0].message.content

        models = ["toy", "support", "french", "small"] * 4
        alone = {model: chat(model) for model in models[:4]}
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(chat, models)) == [alone[model] for model in models]
        assert len(set(alone.values())) == 4
        with served.client() as http:
            figures = http.get("/metrics").text
        assert 'llmopt:adapter_requests_total{adapter="french",model_name="toy"} 5.0' in figures
        assert "llmopt:adapters_in_use" in figures
        client.close()


def test_an_adapter_comes_and_goes_with_the_admin_key(adapted_server, monkeypatch):
    monkeypatch.setattr(
        "llmopt.optimizer.lora.fitting.fit_adapter", lambda *_: Fitted(factors(9), trained_on=None, other_base=None)
    )
    load = {"lora_name": "new", "lora_path": "/somewhere"}
    with adapted_server() as served, served.client() as client:
        assert client.post("/v1/load_lora_adapter", json=load).status_code == 401
        assert client.post("/v1/load_lora_adapter", json=load, headers={"Authorization": "Bearer x"}).status_code == 401
        assert client.post("/v1/load_lora_adapter", json=load, headers=ADMIN).status_code == 200
        assert ask(client, "new") != ask(client, "toy")
        again = client.post("/v1/load_lora_adapter", json=load, headers=ADMIN)
        assert (again.status_code, again.json()["error"]["param"]) == (400, "lora_path")
        own = client.post("/v1/load_lora_adapter", json=load | {"lora_name": "toy"}, headers=ADMIN)
        assert own.status_code == 400
        unload = {"lora_name": "new"}
        assert client.post("/v1/unload_lora_adapter", json=unload).status_code == 401
        assert client.post("/v1/unload_lora_adapter", json=unload, headers=ADMIN).status_code == 200
        assert client.post("/v1/unload_lora_adapter", json=unload, headers=ADMIN).status_code == 404
        assert client.post("/v1/completions", json={"model": "new", "prompt": "x"}).status_code == 404


def test_an_adapter_in_use_is_not_unloaded(adapted_server):
    is_running, may_end = threading.Event(), threading.Event()

    def before_run(kind, slots):
        if kind == "decode":
            is_running.set()
            may_end.wait(10)

    with adapted_server(before_run=before_run) as served, served.client() as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, client, "support")
        assert is_running.wait(10)
        unload = {"lora_name": "support"}
        refused = client.post("/v1/unload_lora_adapter", json=unload, headers=ADMIN)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_in_use")
        other = client.post("/v1/unload_lora_adapter", json={"lora_name": "french"}, headers=ADMIN)
        assert other.status_code == 200
        may_end.set()
        assert answer.result(10)
        assert client.post("/v1/unload_lora_adapter", json=unload, headers=ADMIN).status_code == 200


def test_a_server_without_a_key_loads_nothing(toy_server, catalogue):
    with toy_server(adapters=2, catalogue=catalogue) as served, served.client() as client:
        answer = client.post("/v1/unload_lora_adapter", json={"lora_name": "support"}, headers=ADMIN)
        assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")


def test_what_does_not_fit_is_the_callers_mistake(adapted_server, tmp_path):
    with adapted_server() as served, served.client() as client:
        load = {"lora_name": "new", "lora_path": str(tmp_path)}
        answer = client.post("/v1/load_lora_adapter", json=load, headers=ADMIN)
        assert answer.status_code == 400
        assert json.loads(answer.text)["error"]["message"]
