"""That nothing is executed anywhere else than where somebody said, and that what is missing is named."""

import sys
from types import SimpleNamespace

import onnxruntime as ort
import pytest

from llmopt.optimizer.errors import InputError, MissingExtraError, UnsupportedError
from llmopt.runtime.backends import session
from llmopt.runtime.backends.session import Provider, check_features, open_session

CUDA = "CUDAExecutionProvider"


@pytest.mark.parametrize(("name", "extra"), [("cpu", "cpu"), ("cuda", "gpu"), ("nv_tensorrt_rtx", "gpu")])
def test_a_missing_onnxruntime_names_the_extra_of_the_provider(name, extra, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError) as caught:
        open_session(tmp_path / "model.onnx", 1, provider=Provider(name))
    assert caught.value.hint == f"pip install 'llmopt[{extra}]'"


@pytest.mark.parametrize(("name", "hint"), [("cuda", "onnxruntime-gpu"), ("nv_tensorrt_rtx", "TensorRT for RTX")])
def test_a_package_without_the_provider_is_refused_with_what_it_has(name, hint, monkeypatch, tmp_path):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UnsupportedError, match=r"has no .*ExecutionProvider; it has CPUExecutionProvider") as caught:
        open_session(tmp_path / "model.onnx", 1, provider=Provider(name))
    assert hint in caught.value.hint


class Session:
    """One on a GPU that places nodes as told: ``(provider, operator, domain)``."""

    def __init__(self, nodes, providers=(CUDA, "CPUExecutionProvider")):
        self._nodes = nodes
        self._providers = list(providers)

    def get_providers(self):
        return self._providers

    def get_provider_graph_assignment_info(self):
        return [
            SimpleNamespace(
                ep_name=provider,
                get_nodes=lambda op=operator, where=domain: [SimpleNamespace(op_type=op, domain=where, name="here")],
            )
            for provider, operator, domain in self._nodes
        ]


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """Opens a session on CUDA that is the one given; how it was asked for is noted."""
    asked = {}

    def open_it(made):
        monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA])
        monkeypatch.setattr(
            ort, "InferenceSession", lambda graph, options, providers: asked.update(o=options, p=providers) or made
        )
        return open_session(tmp_path / "model.onnx", 1, provider=Provider("cuda", {"device_id": "1"})), asked

    return open_it


def test_lengths_may_be_computed_on_the_cpu_and_options_reach_the_provider(opened):
    made = Session(
        [
            (CUDA, "GroupQueryAttention", "com.microsoft"),
            (CUDA, "Add", ""),
            ("CPUExecutionProvider", "Shape", ""),
            ("CPUExecutionProvider", "ReduceMax", ""),
        ]
    )
    found, asked = opened(made)
    assert found is made
    assert asked["p"] == [(CUDA, {"device_id": "1"})]
    assert asked["o"].get_session_config_entry("session.record_ep_graph_assignment_info") == "1"


@pytest.mark.parametrize(
    ("operator", "domain"), [("MatMul", ""), ("Softmax", ""), ("MatMulNBits", "com.microsoft"), ("Add", "com.custom")]
)
def test_anything_else_on_the_cpu_is_refused_by_name(opened, operator, domain):
    with pytest.raises(UnsupportedError, match=f"would leave {operator} here to the CPU"):
        opened(Session([(CUDA, "Gather", ""), ("CPUExecutionProvider", operator, domain)]))


def test_many_are_counted(opened):
    with pytest.raises(UnsupportedError, match="MatMul here, MatMul here, MatMul here and 2 more to the CPU"):
        opened(Session([("CPUExecutionProvider", "MatMul", "")] * 5))


def test_a_provider_that_did_not_start_is_an_error(opened):
    """ONNX Runtime itself goes on with the CPU."""
    with pytest.raises(UnsupportedError, match="CUDAExecutionProvider could not be started") as caught:
        opened(Session([], providers=["CPUExecutionProvider"]))
    assert "driver" in caught.value.hint


def test_the_operators_of_lengths_exist():
    import onnx

    for name in session._OF_LENGTHS:
        assert onnx.defs.has(name)


def test_an_engine_may_name_the_tensorrt_that_compiled_it():
    check_features(["tensorrt_rtx"])
    with pytest.raises(UnsupportedError, match="does not know: query_lengths"):
        check_features(["query_lengths", "tensorrt"])


def test_a_provider_knows_its_device():
    assert (Provider().device, Provider("cuda").device, Provider("nv_tensorrt_rtx").device) == ("cpu", "cuda", "cuda")
    assert (Provider("cuda").device_id, Provider("cuda", {"device_id": "2"}).device_id) == (0, 2)
    with pytest.raises(InputError, match="device_id=first is no number of a GPU"):
        Provider("cuda", {"device_id": "first"}).device_id  # noqa: B018
