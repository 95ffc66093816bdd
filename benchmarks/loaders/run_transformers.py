"""Logits of transformers, with compressed-tensors or FP8 dequantized at load."""

import json
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config


def main() -> None:
    """Load, compute, write float32 ``[n, t, vocab]``."""
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    how = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if given["format"] == "fp8" else {}
    network = AutoModelForCausalLM.from_pretrained(given["path"], dtype=torch.float32, **how)
    with torch.no_grad():
        logits = network(torch.from_numpy(np.load(given["ids"]))).logits
    np.save(given["output"], logits.float().numpy())


if __name__ == "__main__":
    main()
