"""llm-compressor's GPTQ or AWQ, 4 bits, symmetric, groups of 32, with its own defaults: run in its own environment."""

import json
import sys
from typing import Any

import numpy as np
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def recipe(method: str) -> list[Any]:
    """The modifiers of a method; the head stays in float."""
    groups = {"ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": _WEIGHTS}}}
    return [GPTQModifier(**groups)] if method == "gptq" else [AWQModifier(), QuantizationModifier(**groups)]


def main() -> None:
    """Quantize and save."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    windows = torch.from_numpy(np.load(settings["windows"]))
    model = AutoModelForCausalLM.from_pretrained(settings["checkpoint"], dtype=torch.float32)
    if not torch.accelerator.is_available():  # its AWQ pins memory for a device that it never asked for
        torch.Tensor.pin_memory = torch.Tensor.contiguous  # type: ignore[method-assign, assignment]
    texts: Any = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
    oneshot(
        model=model,
        dataset=DataLoader(texts, batch_size=1),
        recipe=recipe(settings["options"]["method"]),
        num_calibration_samples=len(texts),
        max_seq_length=windows.shape[1],
    )
    model.save_pretrained(settings["output"], save_compressed=True)
    AutoTokenizer.from_pretrained(settings["checkpoint"]).save_pretrained(settings["output"])


if __name__ == "__main__":
    main()
