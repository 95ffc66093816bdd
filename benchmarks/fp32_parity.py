"""Compares the float engine with transformers, logit by logit: the lowering and the graph passes change nothing.

transformers runs the same checkpoint in float32 with its own modeling code; nothing of llmopt is in its path but the
reading of the file.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmopt.benchmarks.builds import DEFAULT_MODEL, RECIPES, build, source_model
from llmopt.benchmarks.plain_checkpoint import write_checkpoint
from llmopt.benchmarks.report import markdown, publish_result
from llmopt.benchmarks.texts import plain_text, tokens_of
from llmopt.optimizer.manifest import Manifest
from llmopt.runtime.backends.base import Backend
from llmopt.runtime.backends.onnxruntime import open_backend

__all__ = ["main"]

WINDOW = 500
WINDOWS = 4
MAX_DIFFERENCE = 1e-3

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


def engine_logits(backend: Backend, ids: Ids) -> Logits:
    """Logits of every token of one window, float32 ``[tokens, vocab]``."""
    chunk = backend.engine.max_chunk
    parts = [ids[start : start + chunk] for start in range(0, len(ids), chunk)]
    done = [backend.prefill(0, part, i * chunk, np.arange(len(part))) for i, part in enumerate(parts)]
    return np.concatenate(done)


def transformers_logits(checkpoint: Path, windows: Ids) -> list[Logits]:
    """The same from transformers, for each row of ``[windows, tokens]``."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [network(torch.from_numpy(ids)[None]).logits[0].numpy() for ids in windows]


def main() -> int:
    """Build the float recipe where needed, compare, report; 1 when a token differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="a text file; omitted: text sampled from the model")
    parser.add_argument("--build", type=Path, help=f"a build; omitted: recipes/{DEFAULT_MODEL}-fp32.yaml is built")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    directory = arguments.build or build(RECIPES / f"{DEFAULT_MODEL}-fp32.yaml", arguments.out)[0]
    model = source_model(directory)
    text = plain_text(arguments.data, arguments.out) if arguments.data else None
    windows = tokens_of(text, model, windows=WINDOWS, tokens=WINDOW).ids.numpy()
    checkpoint = write_checkpoint(model, arguments.out / "bench" / "checkpoint")
    expected = transformers_logits(checkpoint, windows)
    engine = Manifest.load(directory).engines[0]
    backend = open_backend(directory, engine, slots=1, capacity=WINDOW, threads=arguments.threads)
    same, largest = 0, 0.0
    for ids, wanted in zip(windows, expected, strict=True):
        found = engine_logits(backend, ids)
        same += int((found.argmax(-1) == wanted.argmax(-1)).sum())
        largest = max(largest, float(np.abs(found - wanted).max()))
    data = {"tokens": windows.size, "same_top1": same, "max_difference": largest}
    rows = [["tokens", f"{windows.size:,}"], ["same top-1", f"{same:,}"], ["largest difference", f"{largest:.1e}"]]
    title = f"{directory.name} against transformers in float32"
    publish_result(arguments.out, "fp32_parity", title, markdown(["", "figure"], rows), data)
    return 0 if same == windows.size and largest < MAX_DIFFERENCE else 1


if __name__ == "__main__":
    sys.exit(main())
