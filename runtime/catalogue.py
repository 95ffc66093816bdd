"""The adapters of a build that is open, by the names that requests call them."""

import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmopt.optimizer.errors import InputError
from llmopt.optimizer.lora.adapter_file import AdapterFile, check_name, read_index, write_adapter
from llmopt.optimizer.manifest import LoraSlots

__all__ = ["Catalogue"]


class Catalogue:
    """Which adapters there are; any thread may ask, and change it.

    Args:
        build: Whose they are.
        lora: Which adapters its engine takes; None where it takes none.
        adapters: Those it begins with; the build's own when omitted.
    """

    def __init__(self, build: Path, lora: LoraSlots | None, adapters: Mapping[str, AdapterFile] | None = None) -> None:
        self.lora = lora
        self._build = build
        found = adapters if adapters is not None else read_index(build) if lora is not None else {}
        self._adapters = dict(found)
        self._changing = threading.Lock()
        self._fitted: dict[str, tempfile.TemporaryDirectory[str]] = {}

    @property
    def names(self) -> Sequence[str]:
        """Of all adapters, in order."""
        return sorted(self._adapters)

    def __contains__(self, name: str) -> bool:
        """Whether there is one of that name."""
        return name in self._adapters

    def find(self, name: str) -> AdapterFile:
        """The adapter of a name.

        Raises:
            InputError: There is none, or the engine takes none at all.
        """
        self._takes()
        try:
            return self._adapters[name]
        except KeyError as error:
            raise InputError(
                f"{self._build} has no adapter {name!r}",
                hint=f"it has {', '.join(self.names)}" if self._adapters else "llmopt adapter add adds one",
            ) from error

    def add(self, name: str, folder: Path) -> AdapterFile:
        """Take in an adapter that PEFT saved, for as long as the build is open; the build's folder stays as it is.

        Raises:
            InputError: As ``fit_adapter`` does; or the name is taken, or none.
            UnsupportedError: As ``fit_adapter`` does.
        """
        lora = self._takes()
        check_name(name)
        from llmopt.optimizer.lora.fitting import fit_adapter  # needs torch, which serving alone does not

        with self._changing:
            if name in self._adapters:
                raise InputError(f"there is an adapter {name} already", hint="unload it first, or choose another name")
            fitted = fit_adapter(folder, self._build, lora)
            place = tempfile.TemporaryDirectory(prefix="llmopt-adapter-")
            file = write_adapter(
                name, Path(place.name) / f"{name}.safetensors", fitted.factors, trained_on=fitted.trained_on
            )
            self._fitted[name], self._adapters[name] = place, file
        return file

    def remove(self, name: str) -> None:
        """Let an adapter go; requests that have it keep it.

        Raises:
            InputError: There is none of that name.
        """
        with self._changing:
            self.find(name)
            del self._adapters[name]
            place = self._fitted.pop(name, None)
        if place is not None:
            place.cleanup()

    def _takes(self) -> LoraSlots:
        if self.lora is None:
            raise InputError(
                f"{self._build} takes no adapters", hint="build it with lora: {} among the options of onnx in export:"
            )
        return self.lora
