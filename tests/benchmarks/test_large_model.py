"""Builds whose memory does not grow with the number of layers."""

from math import prod
from typing import Any

import pytest

from llmopt.benchmarks.large_model import build_random, largest_layer
from llmopt.benchmarks.random_checkpoint import LLAMA_3B, parameter_shapes, write_random_llama

SMALL = {**LLAMA_3B, "vocab_size": 260, "hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 2048}


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, int]]:
    """Layers -> step -> the peak memory of building that many."""
    directory, found = tmp_path_factory.mktemp("large"), {}
    for layers in (2, 10):
        checkpoint = write_random_llama(directory / f"llama-{layers}", {**SMALL, "num_hidden_layers": layers})
        record: dict[str, Any] = build_random(checkpoint, "int8", directory, max_ram_gb=None)[0]
        found[layers] = record["peak_memory_bytes_by_step"]
    return found


@pytest.mark.parametrize("step", ["passes", "export"])
def test_eight_layers_more_need_less_than_half_of_their_floats_more_memory(peaks, step: str) -> None:
    layer = 4 * sum(prod(shape) for shape in parameter_shapes(SMALL)["model-00002-of-00030.safetensors"].values())
    assert layer == 4 * largest_layer(SMALL)
    # The C library keeps some of what was freed: two layers' worth at times, however many there are.
    assert peaks[10][step] - peaks[2][step] < 4 * layer
