"""Computes which tokens the answers of guided requests may go on with, while the model runs."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from llmopt.runtime.request import Guide, Request

__all__ = ["Masks"]


class Masks:
    """One thread that fills masks, started with the first guided request.

    Args:
        vocab_size: Tokens of a row of logits.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._thread: ThreadPoolExecutor | None = None
        self._pending: dict[Request, Future[npt.NDArray[np.bool_]]] = {}

    def prepare(self, request: Request) -> None:
        """Begin to compute the mask of a request's next token; nothing happens if it has no guide."""
        if request.guide is None:
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="llmopt-masks")
        self._pending[request] = self._thread.submit(_filled, request.guide, self._vocab_size)

    def take(self, request: Request) -> npt.NDArray[np.bool_] | None:
        """The mask that was prepared, bool ``[vocab]``; None for a request without a guide.

        Raises:
            Exception: Whatever the guide raised.
        """
        pending = self._pending.pop(request, None)
        return None if pending is None else pending.result()

    def forget(self, request: Request) -> None:
        """A request has ended."""
        self._pending.pop(request, None)

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)


def _filled(guide: Guide, vocab_size: int) -> npt.NDArray[np.bool_]:
    words = np.zeros(guide.words, np.int32)
    guide.fill(words)
    return np.unpackbits(words.view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)
