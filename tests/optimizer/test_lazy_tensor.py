"""Tensors that are made when they are written: the same bytes as those of an ordinary tensor."""

import io

import numpy as np
import onnx_ir as ir
import pytest

from llmopt.optimizer.lazy_tensor import StackedTensor, lazy_tensor

KINDS = [(ir.DataType.FLOAT, np.float32), (ir.DataType.INT8, np.int8), (ir.DataType.INT4, np.int8)]


def numbers(shape, dtype):
    return np.random.default_rng(0).integers(-8, 8, shape).astype(dtype)


def file_of(tensor):
    file = io.BytesIO()
    tensor.tofile(file)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "dtype"), KINDS, ids=lambda kind: str(kind))
@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 5, 3), (1, 7)])
def test_a_stack_has_the_bytes_of_its_whole(kind, dtype, shape):
    array = numbers(shape, dtype)
    stack = StackedTensor("stack", kind, shape, lambda i: array[i])
    whole = ir.tensor(array, dtype=kind)
    assert (stack.name, stack.dtype, tuple(stack.shape)) == ("stack", kind, shape)
    np.testing.assert_array_equal(stack.numpy(), whole.numpy())
    assert stack.tobytes() == whole.tobytes()
    assert file_of(stack) == whole.tobytes()


def test_a_stack_is_written_part_by_part():
    array, events = numbers((3, 2, 4), np.float32), []

    class Watched(io.BytesIO):
        def write(self, data):
            events.append("write")
            return super().write(data)

    def part(i):
        events.append(i)
        return array[i]

    StackedTensor("stack", ir.DataType.FLOAT, array.shape, part).tofile(Watched())
    assert events == [0, "write", 1, "write", 2, "write"]


def test_a_lazy_tensor_is_made_each_time_it_is_read():
    made = []

    def make():
        made.append(1)
        return numbers((2, 3), np.float32)

    tensor = lazy_tensor("one", ir.DataType.FLOAT, (2, 3), make)
    assert made == []
    for reads in (1, 2):
        np.testing.assert_array_equal(tensor.numpy(), numbers((2, 3), np.float32))
        assert len(made) == reads
