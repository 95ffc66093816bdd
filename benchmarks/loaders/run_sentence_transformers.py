"""Vectors of sentence-transformers, which opens an engine's folder with its ONNX backend."""

import json
import sys

import numpy as np
import onnxruntime as ort
from sentence_transformers import SentenceTransformer


def main() -> None:
    """Load, encode, write float32 ``[texts, dimensions]``."""
    given = json.loads(sys.argv[1])
    options = ort.SessionOptions()
    options.intra_op_num_threads = given["threads"]
    settings = {"provider": "CPUExecutionProvider", "session_options": options}
    model = SentenceTransformer(given["path"], backend="onnx", model_kwargs=settings)
    np.save(given["output"], np.asarray(model.encode(given["texts"]), dtype=np.float32))


if __name__ == "__main__":
    main()
