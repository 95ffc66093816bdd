"""The installed TensorRT: the package for RTX cards, which compiles without a GPU, or the full one, which needs it."""

import importlib
from types import ModuleType
from typing import Any

from llmopt.optimizer.errors import MissingExtraError, UnsupportedError

__all__ = ["Package", "find_package"]

_OLDEST = (10, 15)
"""The first full TensorRT with native rotary embeddings and updates of caches."""


class Package:
    """One of the two packages.

    Attributes:
        trt: The module. Both have the same classes.
        name: ``tensorrt_rtx`` or ``tensorrt``.
        version: Its version.
    """

    def __init__(self, trt: ModuleType) -> None:
        self.trt: Any = trt
        self.name = trt.__name__
        self.version: str = trt.__version__

    @property
    def title(self) -> str:
        """Name and version, for people."""
        return f"{self.name} {self.version}"

    @property
    def compiles_ahead(self) -> bool:
        """Whether it compiles for GPUs that are not here."""
        return hasattr(self.trt, "ComputeCapability")

    def check_targets(self, targets: tuple[str, ...]) -> None:
        """Raise where this package cannot compile for one of ``targets``, such as ``sm89``.

        Raises:
            UnsupportedError: It has no code for that GPU, or needs it here.
        """
        if self.compiles_ahead:
            known = [each.lower() for each in dir(self.trt.ComputeCapability) if each.startswith("SM")]
            for target in targets:
                if target not in known:
                    raise UnsupportedError(
                        f"{self.title} does not compile for {target}, only for {', '.join(known)}",
                        hint="the full tensorrt compiles for the GPU it runs on: pip install 'llmopt[tensorrt]' there",
                    )
            return
        present = _gpu_here()
        for target in targets:
            if target != present:
                raise UnsupportedError(
                    f"{self.title} compiles for the GPU that is here, which is {present or 'none'}, not for {target}",
                    hint="tensorrt-rtx compiles for other GPUs without one: pip install 'llmopt[tensorrt-rtx]'",
                )


def find_package() -> Package:
    """tensorrt_rtx where it is installed, else tensorrt.

    Raises:
        MissingExtraError: Neither is installed.
        UnsupportedError: The full tensorrt is too old.
    """
    for name in ("tensorrt_rtx", "tensorrt"):
        try:
            package = Package(importlib.import_module(name))
        except ModuleNotFoundError:
            continue
        if not package.compiles_ahead and _numbers(package.version) < _OLDEST:
            raise UnsupportedError(
                f"{package.title} is too old: it has no native cache updates", hint="install tensorrt 10.15 or newer"
            )
        return package
    raise MissingExtraError("tensorrt_rtx", "tensorrt-rtx")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _gpu_here() -> str | None:
    """The compute capability of the first GPU, as ``sm90``; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return f"sm{major}{minor}"
