"""What an encoder's build lost: its vectors against the source model's, of the same texts."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from llmopt.calibration.encoder_reference import EncoderReference
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.manifest import EncoderEngine, Measurement
from llmopt.optimizer.model import Model
from llmopt.optimizer.pooling import Pooling
from llmopt.optimizer.tokens import Tokens
from llmopt.runtime.backends.encoder import EncoderBackend

__all__ = ["cosines", "measure_vectors"]

Vectors = npt.NDArray[np.float32]


def measure_vectors(
    model: Model,
    backend: EncoderBackend,
    texts: Sequence[Tokens],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Measurement]:
    """Mean and smallest cosine similarity of the engine's vectors to the source model's.

    Args:
        model: The source model; run in float32.
        backend: The build's engine.
        texts: What to measure on.
        threads: PyTorch threads; None keeps the process's number.
        progress: Called with (finished, total) texts of both sides.

    Returns:
        For each text in order: ``cosine`` and ``min_cosine``.

    Raises:
        InputError: A text is longer than the engine takes, or no text is given.
    """
    if not texts:
        raise InputError("there is nothing to measure on: no text is given")
    total, done = 2 * sum(len(text.ids) for text in texts), 0

    def tick(finished: int, _: int) -> None:
        progress(done + finished, total)

    reference = EncoderReference(model, pooling=_pooling(backend.engine), threads=threads)
    found: list[Measurement] = []
    for text in texts:
        expected = reference.vectors(text, progress=tick).numpy()
        done += len(text.ids)
        rows = [ids[:length].tolist() for ids, length in zip(text.ids, text.mask.sum(1), strict=True)]
        similarity = cosines(expected, backend.vectors(rows))
        done += len(text.ids)
        progress(done, total)
        for metric, value in (("cosine", similarity.mean()), ("min_cosine", similarity.min())):
            found.append(
                Measurement(
                    metric=metric, value=float(value), data=text.name, data_digest=text.digest, tokens=text.count
                )
            )
    return found


def cosines(expected: Vectors, found: Vectors) -> npt.NDArray[np.float64]:
    """The cosine similarity of each pair of rows, float64 ``[n]``; a row of zeros is similar to none."""
    wide = expected.astype(np.float64), found.astype(np.float64)
    lengths = np.linalg.norm(wide[0], axis=1) * np.linalg.norm(wide[1], axis=1)
    similarity: npt.NDArray[np.float64] = (wide[0] * wide[1]).sum(1) / np.maximum(lengths, 1e-30)
    return np.minimum(similarity, 1.0)


def _pooling(engine: EncoderEngine) -> Pooling:
    return Pooling(mode=engine.pooling, normalize=engine.normalize)
