"""What is timed; how long anything takes, no test says."""

import onnxruntime as ort
import pytest

from llmopt.optimizer.errors import PassError
from llmopt.optimizer.scheme import PRESETS
from llmopt.passes._linear_times import _graph, linear_milliseconds, refuse_untimed

SCHEMES = [
    None,
    PRESETS["W8A8"],
    *(PRESETS[name].with_group_size(32) for name in ("W8A16", "W4A16", "W4A16_ASYM", "W3A16", "W2A16")),
    PRESETS["W2A16"].with_group_size(16),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_scheme_of_the_cpu_has_a_kernel_that_is_timed(scheme) -> None:
    assert linear_milliseconds((64, 128), scheme, threads=1) > 0


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_each_product_has_weights_of_its_own(scheme) -> None:
    model, row = _graph((48, 128), scheme, 3)
    outputs = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": row})
    assert [each.shape for each in outputs] == [(1, 48)] * 3
    assert not (outputs[0] == outputs[1]).all()


def test_a_scheme_without_a_kernel_is_refused() -> None:
    with pytest.raises(PassError, match="FP8 has no kernel on a CPU whose time could be measured"):
        refuse_untimed(PRESETS["FP8"])
    for scheme in SCHEMES:
        refuse_untimed(scheme)
