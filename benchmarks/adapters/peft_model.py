"""PEFT's own merged model, executed by transformers: nothing of llmopt is in it."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmopt.benchmarks.fp32_parity import engine_logits
from llmopt.evaluation.distance import Distance
from llmopt.runtime.backends.base import Backend

__all__ = ["distances", "merged_by_peft"]


def merged_by_peft(checkpoint: Path, adapter: Path) -> Any:
    """The base with the adapter in its weights, as ``merge_and_unload`` makes it, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT asks by a name that has gone
        adapted: Any = PeftModel.from_pretrained(base, adapter)
    return adapted.merge_and_unload().eval()


def distances(network: Any, backends: list[Backend], ids: Tensor) -> list[Distance]:
    """How far each engine is from the network, on windows int64 ``[n, t]``, each from its own beginning."""
    found = [Distance() for _ in backends]
    for window in ids:
        with torch.inference_mode():
            expected = network(window[None]).logits[0]
        for distance, backend in zip(found, backends, strict=True):
            logits = engine_logits(backend, window.numpy().astype(np.int64))
            distance.add(expected, torch.from_numpy(logits), window[1:])
            backend.drop(0)
    return found
