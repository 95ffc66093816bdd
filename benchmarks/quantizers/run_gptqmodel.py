"""GPTQModel's GPTQ, 4 bits, symmetric, groups of 32, with its own defaults: run in its own environment."""

import json
import sys

import numpy as np
import torch
from gptqmodel import GPTQConfig, GPTQModel


def main() -> None:
    """Quantize and save."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    windows = np.load(settings["windows"])
    config = GPTQConfig(bits=4, group_size=32, sym=True, **settings["options"])
    model = GPTQModel.load(settings["checkpoint"], config, device="cpu", dtype=torch.float32)
    texts = [{"input_ids": window.tolist(), "attention_mask": [1] * len(window)} for window in windows]
    model.quantize(texts, batch_size=1)
    model.save(settings["output"])


if __name__ == "__main__":
    main()
