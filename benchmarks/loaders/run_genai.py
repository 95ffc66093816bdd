"""Logits of onnxruntime-genai behind every token, one by one: it gives those of the last token only."""

import json
import sys

import numpy as np
import onnxruntime_genai as og


def main() -> None:
    """Load, compute, write float32 ``[n, t, vocab]``."""
    given = json.loads(sys.argv[1])
    ids = np.load(given["ids"])
    model = og.Model(given["path"])
    rows = []
    for window in ids:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(window) + 1, do_sample=False)
        generator = og.Generator(model, parameters)
        logits = []
        for token in window:
            generator.append_tokens(np.array([token], np.int32))
            logits.append(np.array(generator.get_output("logits"), dtype=np.float32).reshape(-1))
        rows.append(np.stack(logits))
    np.save(given["output"], np.stack(rows))


if __name__ == "__main__":
    main()
