"""What each option of GPTQ is worth: one changed at a time from the defaults, on the same model, text and judge."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmopt.benchmarks.quantizers.compare import Bench, Result
from llmopt.benchmarks.quantizers.judge import Judge
from llmopt.benchmarks.quantizers.rows import Row
from llmopt.benchmarks.quantizers.subject import CALIBRATION, TEXT, add_options, calibration_windows, prepare
from llmopt.benchmarks.report import markdown, publish_result, say
from llmopt.optimizer.errors import InputError

__all__ = ["VARIANTS", "Variant", "main", "row_of"]

WIKIPEDIA = Path("wikipedia_sample/wikipedia.jsonl")
"""Below ``--data``; like the judge's text, and no part of it."""

SAMPLED = "sampled"
"""Text that the model writes itself."""

_W4 = {"scheme": "W4A16", "group_size": 32}


@dataclass(frozen=True, slots=True)
class Variant:
    """The defaults but for one thing.

    Attributes:
        option: What changes.
        value: To what.
        options: Of the pass ``gptq``.
        text: A path below ``--data``, or ``SAMPLED``.
        share: Of the calibration windows.
    """

    option: str
    value: str
    options: Mapping[str, Any] = field(default_factory=dict)
    text: str = str(CALIBRATION)
    share: float = 1


def _each(option: str, *values: object, **also: Any) -> list[Variant]:
    return [Variant(option, str(value).lower(), {option: value, **also}) for value in values]


VARIANTS: tuple[Variant, ...] = (
    Variant("rounding to nearest", ""),
    Variant("defaults", ""),
    *_each("token_weighting", "none", "inverse_norm"),
    *_each("act_order", False),
    *_each("clipping", "none", "weights"),
    *_each("damping", 0.001, 0.1),
    *_each("error_propagation", 0.0, 0.5, 1.0),
    *_each("inputs", "float"),
    *_each("true_sequential", True),
    Variant("calibration text", "Wikipedia", text=str(WIKIPEDIA)),
    Variant("calibration text", "sampled from the model", text=SAMPLED),
    *(Variant("calibration windows", f"1/{round(1 / share)}", share=share) for share in (0.5, 0.25, 0.0625)),
)
"""Values that are the default are the row ``defaults``."""


def row_of(variant: Variant) -> Row:
    """What the comparison runs for a variant."""
    name = "-".join(f"{variant.option} {variant.value}".replace("/", " ").split())
    method = "round_to_nearest" if variant == VARIANTS[0] else "gptq"
    return Row(name, variant.option, variant.value, passes=[{method: {**_W4, **variant.options}}])


def _line(result: Result, rounding: Result | None) -> list[str]:
    row, figures = result.row, result.figures
    if figures is None or result.finished is None:
        return [row.method, row.scheme, f"failed: {result.error}".replace("|", "/"), "", "", "", ""]
    removed = "-"
    if rounding is not None and rounding.figures is not None and rounding is not result:
        removed = f"{1 - figures.increase / rounding.figures.increase:.0%}"
    line = [row.method, row.scheme, f"{figures.perplexity:.3f}", f"{figures.increase:+.2%}", removed]
    return [*line, f"{figures.kl:.4f}", f"{result.finished.seconds:.0f}"]


def table(results: Sequence[Result]) -> str:
    """One line a variant; the share removed is of what rounding to nearest adds to the perplexity."""
    header = ["option", "value", "perplexity", "change", "of rounding's removed", "KL, nats/token", "seconds"]
    rounding = next((each for each in results if each.row == row_of(VARIANTS[0])), None)
    return markdown(header, [_line(result, rounding) for result in results])


def chosen(wanted: Sequence[str]) -> list[Variant]:
    """The variants of the options named ``wanted`` with rounding and the defaults, or all.

    Raises:
        InputError: There is no such option.
    """
    known = {variant.option for variant in VARIANTS}
    if unknown := set(wanted) - known:
        raise InputError(f"there is no option {min(unknown)!r}", hint=f"options are {', '.join(sorted(known))}")
    return [each for each in VARIANTS if not wanted or each.option in {*wanted, *(v.option for v in VARIANTS[:2])}]


def main() -> None:
    """Run the variants, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help=f"a folder with {TEXT}, {CALIBRATION}, {WIKIPEDIA}")
    parser.add_argument("--options", nargs="*", default=[], help="names in the first column; omitted: all")
    add_options(parser)
    arguments = parser.parse_args()
    variants = chosen(arguments.options)
    say("preparing the model and the text")
    subject, folder, threads = prepare(arguments), arguments.out / "bench", arguments.threads
    path = folder / "quantized" / "ablation.npy"
    bench = Bench(subject, Judge(subject.model, subject.text.ids, threads=threads), path, folder, threads)
    results = []
    for number, variant in enumerate(variants, start=1):
        text = None if variant.text == SAMPLED else arguments.data / variant.text
        taken = calibration_windows(subject, text, path, samples=max(1, round(subject.samples * variant.share)))
        row = row_of(variant)
        if variant.share < 1:
            row = replace(row, scheme=str(taken))
        say(f"variant {number} of {len(variants)}: {row.name}, {taken} windows")
        results.append(bench.result(row))
        say(" | ".join(_line(results[-1], results[0])))
    title = f"GPTQ, one option at a time: {subject.described}, W4A16 g32"
    publish_result(arguments.out, "ablation", title, table(results), [each.plain() for each in results])


if __name__ == "__main__":
    main()
