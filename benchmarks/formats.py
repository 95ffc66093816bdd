"""Loads what llmopt writes in the programs it is written for, and compares their logits with our own execution."""

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmopt.benchmarks.child import last_line
from llmopt.benchmarks.loaders.programs import HERE, LOADERS
from llmopt.benchmarks.peer import installed, run_script
from llmopt.benchmarks.quantizers.run_passes import GivenWindows, quantized, recipe_of
from llmopt.benchmarks.quantizers.subject import DEFAULT_SPEC
from llmopt.benchmarks.report import markdown, publish_result, say
from llmopt.calibration.reference import Reference
from llmopt.calibration.sampling import Sampling, sample_tokens
from llmopt.optimizer.cache import cache_root
from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.errors import LlmoptError
from llmopt.optimizer.loader import load
from llmopt.optimizer.model import Model
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens

__all__ = ["ROWS", "Row", "main", "table"]

_W4: Mapping[str, Any] = {"scheme": "W4A16", "group_size": 32, "head": "none"}


@dataclass(frozen=True, slots=True)
class Row:
    """A checkpoint and a program that loads it.

    Attributes:
        form: The format.
        scheme: Of the linears, as printed.
        loader: A name in ``LOADERS``.
        passes: As in a recipe.
        export: The exporter and its options; omitted: a checkpoint of the format.
    """

    form: str
    scheme: str
    loader: str
    passes: Sequence[Mapping[str, Mapping[str, Any]]] = ()
    export: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _rounded(form: str, name: str, loader: str = "transformers", **options: Any) -> Row:
    return Row(form, name, loader, [{"round_to_nearest": {"head": "none", **options}}])


def _gguf(kind: str, scheme: str | None = None, **options: Any) -> Row:
    passes = [] if scheme is None else [{"round_to_nearest": {"scheme": scheme, "group_size": 32, **options}}]
    name = kind if scheme is None else f"{scheme} g32, transcribed"
    return Row("gguf", name, "llama_cpp", passes, {"gguf": {"type": kind}})


def _genai(name: str, **options: Any) -> Row:
    passes = [{"round_to_nearest": options}] if options else []
    return Row("genai", name, "genai", passes, {"onnx": {"flavor": "genai", "capacity": 256}})


ROWS: tuple[Row, ...] = (
    Row("safetensors", "float", "transformers"),
    _rounded("compressed-tensors", "W4A16 g32", **_W4),
    _rounded("compressed-tensors", "W8A16", scheme="W8A16"),
    _rounded("compressed-tensors", "W3A16 g32", **{**_W4, "scheme": "W3A16"}),
    _rounded(
        "compressed-tensors",
        "W4A16 g32, down W8A8",
        **_W4,
        overrides=[{"match": "re:.*down_proj", "scheme": "W8A8"}],
    ),
    _rounded("compressed-tensors", "W8A8", scheme="W8A8"),
    _rounded("compressed-tensors", "FP8_DYNAMIC", scheme="FP8_DYNAMIC"),
    Row(
        "compressed-tensors",
        "W4A16 g32, int8 cache",
        "transformers",
        [{"round_to_nearest": _W4}, {"kv_cache": {"strategy": "tensor"}}],
    ),
    _rounded("gptq", "W4A16 g32", "gptqmodel", **_W4),
    _rounded("gptq", "W8A16 g32", "gptqmodel", **{**_W4, "scheme": "W8A16"}),
    _rounded("gptq_v2", "W4A16_ASYM g32", "gptqmodel", **{**_W4, "scheme": "W4A16_ASYM"}),
    _rounded("awq", "W4A16_ASYM g32", "gptqmodel", **{**_W4, "scheme": "W4A16_ASYM"}),
    *(_gguf(kind) for kind in ("F32", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")),
    *(_gguf("F16", scheme) for scheme in ("W4A16", "W4A16_ASYM", "W8A16")),
    _genai("float"),
    _genai("W8A8", scheme="W8A8"),
    _genai("W4A16 g32", scheme="W4A16", group_size=32),
)


@dataclass(frozen=True, slots=True)
class Result:
    """What a program made of a checkpoint.

    Attributes:
        row: Which.
        difference: The largest of logits; None where it did not load.
        spread: The standard deviation of our logits.
        top1: Share of tokens with the same most likely successor.
        error: The last line of what it said; None where it loaded.
    """

    row: Row
    difference: float | None = None
    spread: float | None = None
    top1: float | None = None
    error: str | None = None


def table(results: Sequence[Result]) -> str:
    """One line a row."""
    header = ["format", "scheme", "loader", "loads", "max difference", "of our logits' deviation", "same top-1"]
    lines = []
    for result in results:
        line = [result.row.form, result.row.scheme, LOADERS[result.row.loader].title]
        if result.difference is None or result.spread is None:
            lines.append([*line, f"no: {result.error}".replace("|", "/"), "", "", ""])
        else:
            share = result.difference / result.spread
            lines.append([*line, "yes", f"{result.difference:.2g}", f"{share:.2g}", f"{result.top1:.2%}"])
    return markdown(header, lines)


@dataclass(frozen=True)
class Bench:
    """What the rows share.

    Attributes:
        model: In float.
        text: Sampled from it.
        folder: Where everything is written.
        threads: Of every program.
    """

    model: Model
    text: Tokens
    folder: Path
    threads: int

    def result(self, row: Row) -> Result:
        """Write a row's checkpoint, load it with its program, compare."""
        build, logits = self.folder / "build", self.folder / "logits.npy"
        shutil.rmtree(build, ignore_errors=True)
        recipe = recipe_of(self.model.source.spec, row.passes, threads=self.threads)
        made = quantized(self.model, recipe, cache=cache_root(), windows=GivenWindows(self.text))
        ((exporter, options),) = (row.export or {"checkpoint": {"format": row.form}}).items()
        instance = load("exporters", exporter)(**options)
        instance.export(made, build, PassContext(verify="none"))
        try:
            self._load(row, build / instance.folder, logits)
        except LlmoptError as error:
            return Result(row, error=last_line(error))
        ours = Reference(_as_written(made, build / instance.folder), threads=self.threads).logits(self.text.ids)
        return _compared(row, torch.from_numpy(np.load(logits)), ours)

    def _load(self, row: Row, checkpoint: Path, logits: Path) -> None:
        loader, ids = LOADERS[row.loader], self.folder / "ids.npy"
        np.save(ids, self.text.ids.numpy())
        here = row.loader in HERE
        python = Path(sys.executable) if here else installed(loader, self.folder.parent / row.loader)
        given = {"path": str(checkpoint.absolute()), "ids": str(ids.absolute()), "format": row.form}
        run_script(python, loader, given, output=logits, threads=self.threads)


def _as_written(made: Model, folder: Path) -> Model:
    """The model that was written, read back where it can be: with scales and floats as they are stored."""
    if any(folder.glob("*.safetensors")):
        return load_model(str(folder), cache=cache_root())
    files = list(folder.glob("*.gguf"))
    return load_model(str(files[0]), cache=cache_root()) if files else made


def _compared(row: Row, theirs: Tensor, ours: Tensor) -> Result:
    same = (theirs.argmax(-1) == ours.argmax(-1)).float().mean()
    return Result(row, float((theirs - ours).abs().max()), float(ours.std()), float(same))


def main() -> None:
    """Write, load, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=DEFAULT_SPEC, help="as in a recipe")
    parser.add_argument("--loaders", nargs="*", default=[], help=f"of {', '.join(LOADERS)}; omitted: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    rows = [row for row in ROWS if not arguments.loaders or row.loader in arguments.loaders]
    folder = arguments.out / "bench" / "loaders" / "work"
    folder.mkdir(parents=True, exist_ok=True)
    model = load_model(arguments.model, cache=cache_root())
    text = sample_tokens(model, Sampling("evaluation", 2, 64), threads=arguments.threads)
    bench, results = Bench(model, text, folder, arguments.threads), []
    for number, row in enumerate(rows, start=1):
        say(f"row {number} of {len(rows)}: {row.form}, {row.scheme}, {row.loader}")
        results.append(bench.result(row))
    windows, tokens = text.ids.shape
    title = f"What other programs load: {arguments.model}, {windows} windows of {tokens} tokens"
    publish_result(arguments.out, "formats", title, table(results), [asdict(each) for each in results])


if __name__ == "__main__":
    main()
