"""What is left of a trained adapter that is merged into weights which were quantized before it.

The base is quantized and exported by llmopt, read back, and gets the adapter that ``lora_demo`` has trained; beside it
stands the other order: merged into the float base, which is quantized then. Both are compared with the float merge.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmopt.benchmarks.adapters.tickets import trained_on
from llmopt.benchmarks.adapters.training import packed
from llmopt.benchmarks.adapters.variants import HELD_OUT
from llmopt.benchmarks.demo import show
from llmopt.benchmarks.quantizers.run_passes import GivenWindows, recipe_of
from llmopt.benchmarks.quantizers.subject import DEFAULT_SPEC
from llmopt.benchmarks.report import markdown, publish_result, say
from llmopt.calibration.same_function import verify_same_function
from llmopt.calibration.texts import read_tokens
from llmopt.evaluation.measure import measure_model
from llmopt.optimizer.cache import cache_root
from llmopt.optimizer.errors import InputError, LlmoptError
from llmopt.optimizer.manifest import Measurement
from llmopt.optimizer.model import Model
from llmopt.optimizer.pipeline import run_passes
from llmopt.optimizer.progress import Silent
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokens import Tokens

__all__ = ["Row", "line", "main"]

_SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "W8A16": {"scheme": "W8A16", "head": "none"},
    "W4A16": {"scheme": "W4A16", "group_size": 32, "head": "none"},
}

_RECIPE = """\
version: 1
model: {model}
passes:
  - round_to_nearest: {options}
export:
  - checkpoint: {{format: compressed-tensors, dtype: float32}}
verify: none
accept: [{{metric: kl, max: 100, windows: 1, tokens: 8}}]
"""

_HEADER = ["base", "then", "adapter kept", "perplexity", "KL, nats/token", "same top-1"]


@dataclass(frozen=True, slots=True)
class Row:
    """One way to a quantized model with the adapter.

    Attributes:
        scheme: Of its weights.
        then: What was done, in words.
        kept: Mean share of the adapter's change that its weights have; None where none is rounded again.
        found: Against the float merge: ``kl``, ``top1``, ``perplexity``.
    """

    scheme: str
    then: str
    kept: float | None
    found: Mapping[str, Measurement]


def line(row: Row) -> list[str]:
    """A line of the table."""
    kept = "" if row.kept is None else f"{row.kept:.0%}"
    figures = [f"{row.found['perplexity'].value:.3f}", f"{row.found['kl'].value:.4f}", f"{row.found['top1'].value:.1%}"]
    return [row.scheme, row.then, kept, *figures]


@dataclass(frozen=True, slots=True)
class _Bench:
    """What every row needs."""

    folder: Path
    windows: GivenWindows
    text: Tokens
    threads: int

    def behind(self, model: Model, passes: Sequence[Mapping[str, Mapping[str, Any]]]) -> tuple[Model, float | None]:
        """The model behind passes, and the mean share of the adapter that weights which were rounded again have."""
        recipe = recipe_of(model.source.spec, passes, threads=self.threads)
        changed, records = run_passes(
            model,
            recipe,
            cache=cache_root(),
            progress=Silent(),
            verifier=verify_same_function,
            calibration=self.windows if recipe.needs_calibration else None,
        )
        shares = [share for record in records for share in record.details.get("adapter_kept", {}).values()]
        return changed, sum(shares) / len(shares) if shares else None

    def rows(self, float_merge: Model, scheme: str) -> Iterator[Row]:
        """Every way of one scheme."""
        merge, options = self.merge(), _SCHEMES[scheme]
        base = load_model(str(self.quantized_base(scheme)), cache=cache_root())
        ways: list[tuple[str, Model, list[Any]]] = [
            ("nothing: the adapter is left out", base, []),
            ("merge_lora", base, [merge]),
            ("merge_lora: {requantize: gptq}", base, [{"merge_lora": {**merge["merge_lora"], "requantize": "gptq"}}]),
            ("in float: merge_lora, round_to_nearest", float_merge, [{"round_to_nearest": options}]),
            ("in float: merge_lora, gptq", float_merge, [{"gptq": options}]),
        ]
        for then, model, passes in ways:
            say(f"{scheme}: {then}")
            changed, kept = self.behind(model, passes)
            found = measure_model(float_merge, changed, [self.text], threads=self.threads)
            row = Row(scheme, then, kept, {each.metric: each for each in found})
            say(" | ".join(line(row)))
            yield row

    def merge(self) -> dict[str, dict[str, Any]]:
        """The pass that merges the adapter."""
        return {"merge_lora": {"adapters": [{"path": str((self.folder / "adapter").resolve())}]}}

    def quantized_base(self, scheme: str) -> Path:
        """A checkpoint of the base without the adapter, written by ``llmopt build``."""
        recipe, directory = self.folder / f"base-{scheme}.yaml", self.folder / "builds" / f"base-{scheme}"
        options = ", ".join(f"{key}: {value}" for key, value in _SCHEMES[scheme].items())
        recipe.write_text(_RECIPE.format(model=DEFAULT_SPEC, options=f"{{{options}}}"), encoding="utf-8")
        show("build", str(recipe), "-o", str(directory), "--force")
        return directory / "checkpoint"


def main() -> int:
    """Quantize the bases, merge, measure, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--windows", type=int, default=8, help="of the text that is measured on")
    parser.add_argument("--tokens", type=int, default=256, help="per window")
    parser.add_argument("--samples", type=int, default=16, help="windows of the text that was trained on, for GPTQ")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        table, data = _measured(arguments)
    except LlmoptError as error:
        print(f"\nerror: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return 1
    title = f"Against the float merge on {HELD_OUT}: {arguments.windows} windows of {arguments.tokens} tokens"
    publish_result(arguments.out, "lora_requantize", title, table, data)
    return 0


def _measured(arguments: argparse.Namespace) -> tuple[str, list[list[str]]]:
    folder: Path = arguments.out / "lora-demo"
    if not (folder / "adapter").is_dir():
        raise InputError(f"there is no {folder / 'adapter'}", hint="python -m llmopt.benchmarks.lora_demo trains it")
    source = load_model(DEFAULT_SPEC, cache=cache_root())
    directory = source.source.tokenizer_dir
    ids = packed(trained_on(1000), directory, tokens=arguments.tokens)[: arguments.samples]
    text = read_tokens(folder / HELD_OUT, directory, windows=arguments.windows, tokens=arguments.tokens, name=HELD_OUT)
    windows = GivenWindows(Tokens("tickets", ids, f"{arguments.samples} windows of {arguments.tokens} tokens"))
    bench = _Bench(folder, windows, text, arguments.threads)
    float_merge, _ = bench.behind(source, [bench.merge()])
    plain = measure_model(float_merge, source, [text], threads=arguments.threads)
    rows = [Row("float", "nothing: the adapter is left out", None, {each.metric: each for each in plain})]
    for scheme in _SCHEMES:
        rows += bench.rows(float_merge, scheme)
    lines = [line(row) for row in rows]
    merged = next(each.source for each in plain if each.metric == "perplexity")
    first = ["float", "merge_lora", "100%", f"{merged:.3f}", "0.0000", "100.0%"]
    return markdown(_HEADER, [first, *lines]), [first, *lines]


if __name__ == "__main__":
    sys.exit(main())
