"""Logits of GPTQModel, which loads GPTQ and AWQ on a CPU with its kernels in PyTorch."""

import json
import sys

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel


def main() -> None:
    """Load, compute, write float32 ``[n, t, vocab]``."""
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    backend = BACKEND.TORCH_AWQ if given["format"] == "awq" else BACKEND.TORCH
    network = GPTQModel.load(given["path"], device="cpu", dtype=torch.float32, backend=backend)
    with torch.no_grad():
        logits = network.model(torch.from_numpy(np.load(given["ids"]))).logits
    np.save(given["output"], logits.float().numpy())


if __name__ == "__main__":
    main()
