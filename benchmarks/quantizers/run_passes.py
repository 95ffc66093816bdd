"""Runs the passes of one row on a checkpoint, in a process of its own so that its time and memory are its own."""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmopt.calibration.same_function import verify_same_function
from llmopt.optimizer.cache import publish
from llmopt.optimizer.loader import load
from llmopt.optimizer.model import Model
from llmopt.optimizer.pipeline import run_passes
from llmopt.optimizer.progress import Silent
from llmopt.optimizer.recipe import NamedPass, Recipe, Resources
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens
from llmopt.optimizer.weight_store import WeightStore

__all__ = ["GivenWindows", "main", "quantized", "recipe_of"]

Steps = Sequence[Mapping[str, Mapping[str, Any]]]
"""The ``passes:`` of a recipe."""


@dataclass(frozen=True, slots=True)
class GivenWindows:
    """Calibration text that is cut already; a ``CalibrationText``.

    Attributes:
        text: The windows.
    """

    text: Tokens

    @property
    def digest(self) -> str:
        """Of the windows."""
        return self.text.digest

    def tokens(self) -> Tokens:
        """The windows."""
        return self.text

    @staticmethod
    def read(path: Path) -> "GivenWindows":
        """From a NumPy file of int64 ``[windows, tokens]``, which other programs read too."""
        ids = torch.from_numpy(np.load(path))
        return GivenWindows(Tokens(path.stem, ids, hashlib.sha256(path.read_bytes()).hexdigest()))


def recipe_of(model: str, passes: Steps, *, threads: int, seed: int = 0) -> Recipe:
    """A recipe that exports nothing and verifies nothing, as the other programs do.

    Raises:
        InputError: There is no such pass.
        ValidationError: An option is wrong.
    """
    steps = [(name, options) for step in passes for name, options in step.items()]
    return Recipe(
        version=1,
        model=model,
        passes=tuple(NamedPass(name, load("passes", name)(**options)) for name, options in steps),
        export=(),
        base=Path(),
        verify="none",
        resources=Resources(threads=threads),
        seed=seed,
    )


def quantized(model: Model, recipe: Recipe, *, cache: Path, windows: GivenWindows | None = None) -> Model:
    """The model behind the recipe's passes."""
    behind, _ = run_passes(
        model, recipe, cache=cache, progress=Silent(), verifier=verify_same_function, calibration=windows
    )
    return behind


def main() -> None:
    """Run them with nothing in the cache, and write what they changed to a folder that appears whole."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("passes", type=json.loads, help="as in a recipe, in JSON")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--windows", type=Path, required=True, help="a NumPy file, int64 [windows, tokens]")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = recipe_of(arguments.checkpoint, arguments.passes, threads=arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.output.parent) as cache:
        model = load_model(arguments.checkpoint, cache=Path(cache))
        behind = quantized(model, recipe, windows=GivenWindows.read(arguments.windows), cache=Path(cache))
        with publish(arguments.output) as partial:
            store = WeightStore(partial)
            for name, weight in behind.weights.items():
                if model.weights.get(name) is not weight:
                    store.keep({name: weight})
            store.close()


if __name__ == "__main__":
    main()
