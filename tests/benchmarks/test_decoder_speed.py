import numpy as np
import numpy.typing as npt

from llmopt.benchmarks.decoder_speed import DECODE_BATCHES, PAST, PREFILL_SHAPES, STEPS, measure


class Recorded:
    """Writes down what it is asked to run."""

    vocab_size = 100

    def __init__(self) -> None:
        self.prefills: list[tuple[int, ...]] = []
        self.decodes: list[tuple[int, int]] = []

    def prefill(self, ids: npt.NDArray[np.int64]) -> None:
        self.prefills.append(ids.shape)

    def decode(self, ids: npt.NDArray[np.int64], past: int) -> None:
        self.decodes.append((len(ids), past))


def test_every_shape_is_measured_as_often_and_at_the_same_past() -> None:
    decoder = Recorded()
    speeds = measure(decoder, np.arange(2048))
    assert list(speeds) == [f"prefill {b}x{t}" for b, t in PREFILL_SHAPES] + [f"decode B{b}" for b in DECODE_BATCHES]
    assert all(speed > 0 for speed in speeds.values())
    assert decoder.prefills[:8] == [shape for shape in PREFILL_SHAPES for _ in range(4)]
    for batch in DECODE_BATCHES:
        pasts = [past for size, past in decoder.decodes if size == batch]
        assert pasts == list(range(PAST, PAST + STEPS)) * 4


def test_no_shape_needs_more_tokens_than_there_are() -> None:
    assert max(batch * tokens for batch, tokens in PREFILL_SHAPES) <= 2048
    assert max(DECODE_BATCHES) * max(PAST, STEPS) <= 2048
