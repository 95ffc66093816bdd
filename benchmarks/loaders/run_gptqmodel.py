"""Logits of GPTQModel, which loads GPTQ and AWQ on a CPU with its kernels in PyTorch; GPTQ's take 16 bits only."""

import json
import sys

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel


def main() -> None:
    """Load, compute, write float32 ``[n, t, vocab]``."""
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    backend, dtype = (BACKEND.TORCH_AWQ, torch.float32) if given["format"] == "awq" else (BACKEND.TORCH, torch.float16)
    network = GPTQModel.load(given["path"], device="cpu", dtype=dtype, backend=backend)
    with torch.no_grad():
        logits = network.model(torch.from_numpy(np.load(given["ids"]))).logits
    np.save(given["output"], logits.float().numpy())


if __name__ == "__main__":
    main()
