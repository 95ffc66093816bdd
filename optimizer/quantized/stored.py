"""The tensors of a quantized checkpoint, taken by name and by what they have to be."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from llmopt.optimizer.errors import InputError
from llmopt.optimizer.tensor_file import FileTensor

__all__ = ["FLOATS", "Stored"]

FLOATS = ("F32", "F16", "BF16")
"""What scales are stored as."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What a checkpoint holds.

    Attributes:
        where: The checkpoint, for messages.
        tensors: By name; only headers have been read.
    """

    where: object
    tensors: Mapping[str, FileTensor]

    def take(self, name: str, dtypes: Collection[str], shape: tuple[int | None, ...] | None = None) -> FileTensor:
        """The tensor ``name``; None in ``shape`` is any size.

        Raises:
            InputError: It is missing, or has another dtype or shape.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise InputError(f"{self.where} lacks {name}", hint="the checkpoint is incomplete: fetch it again")
        if tensor.dtype not in dtypes:
            raise InputError(
                f"{self.where}: {name} has dtype {tensor.dtype}, not {' or '.join(dtypes)}",
                hint="config.json names another format than the tensors have",
            )
        fits = shape is None or (
            len(shape) == len(tensor.shape)
            and all(wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True))
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape or ())
            raise InputError(
                f"{self.where}: {name} is {list(tensor.shape)}, not [{wanted}]",
                hint="bits and group_size in config.json do not belong to these tensors, or the file is damaged",
            )
        return tensor

    def one(self, name: str) -> FileTensor:
        """The tensor ``name`` with one number of floating point, whether it is a scalar or ``[1]``."""
        tensor = self.take(name, FLOATS)
        if tensor.shape not in ((), (1,), (1, 1)):
            raise InputError(
                f"{self.where}: {name} is {list(tensor.shape)}, not one number",
                hint="config.json says that it is a scale of the whole tensor",
            )
        return tensor

    def modules(self, marks: Collection[str]) -> list[str]:
        """The modules that have one of the tensors ``marks``, in the order of the file."""
        found = (name.removesuffix(f".{mark}") for name in self.tensors for mark in marks if name.endswith(f".{mark}"))
        return list(dict.fromkeys(found))
