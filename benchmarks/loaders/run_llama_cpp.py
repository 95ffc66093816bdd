"""Logits of llama.cpp, and how it tokenizes texts, through llama-cpp-python."""

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama


def main() -> None:
    """Load, compute, write float32 ``[n, t, vocab]``; print the tokens of each of ``texts`` as JSON."""
    given = json.loads(sys.argv[1])
    ids = np.load(given["ids"])
    path = next(Path(given["path"]).glob("*.gguf"))
    engine = Llama(
        str(path), n_ctx=ids.shape[1] + 1, n_batch=ids.shape[1], n_threads=given["threads"], logits_all=True,
        flash_attn=False, type_k=0, type_v=0, use_mmap=False, verbose=False,
    )  # fmt: skip
    rows = []
    for window in ids:
        engine.reset()
        engine.eval(window.tolist())
        rows.append(np.array(engine.scores[: len(window)], dtype=np.float32))
    np.save(given["output"], np.stack(rows))
    texts = given.get("texts", [])
    tokens = [engine.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    sys.stdout.write(json.dumps(tokens))


if __name__ == "__main__":
    main()
