"""Compares ways to quantize a model, ours and other programs', by one judge: accuracy, size, time and memory.

All start from the same files: the model off the grid of the file that it comes from, as a plain checkpoint. All see the
same calibration windows. The other programs are installed in environments of their own, below ``out/bench/peers``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from llmopt.benchmarks.quantizers.chart import Point, plot
from llmopt.benchmarks.quantizers.compare import Bench, Result
from llmopt.benchmarks.quantizers.judge import Judge
from llmopt.benchmarks.quantizers.rows import ROWS, available, chosen
from llmopt.benchmarks.quantizers.subject import (
    CALIBRATION,
    TEXT,
    Subject,
    add_options,
    calibration_windows,
    prepare,
)
from llmopt.benchmarks.report import markdown, publish_result, say

__all__ = ["main", "table"]

_HEADER = (
    "row",
    "program",
    "method",
    "scheme",
    "perplexity",
    "change",
    "KL, nats/token",
    "same top-1",
    "linears, MB",
    "bits/weight",
    "seconds",
    "peak memory, GB",
)


def table(results: Sequence[Result]) -> str:
    """One line a row; one that failed says why."""
    return markdown(_HEADER, [_line(result) for result in results])


def _line(result: Result) -> list[str]:
    row, figures, size, finished = result.row, result.figures, result.size, result.finished
    line = [row.name, result.program, row.method, row.scheme]
    if figures is None or size is None:
        return [*line, f"failed: {result.error}".replace("|", "/"), *[""] * (len(_HEADER) - len(line) - 1)]
    line += [f"{figures.perplexity:.3f}", f"{figures.increase:+.2%}", f"{figures.kl:.4f}", f"{figures.top1:.2%}"]
    line += [f"{size.bytes / 1e6:.1f}", f"{size.bits_per_weight:.2f}"]
    return [
        *line,
        *(["-", "-"] if finished is None else [f"{finished.seconds:.0f}", f"{finished.peak_bytes / 1e9:.2f}"]),
    ]


def points(results: Sequence[Result]) -> list[Point]:
    """Those that can be drawn: the float model itself, with no divergence, cannot on a logarithmic scale."""
    return [
        Point(
            f"{result.row.method} {result.row.scheme}", result.program, result.size.bits_per_weight, result.figures.kl
        )
        for result in results
        if result.size is not None and result.figures is not None and result.figures.kl > 0
    ]


def main() -> None:
    """Run the rows, print the table, write the plot and the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help=f"a folder with {TEXT} and {CALIBRATION}")
    parser.add_argument("--rows", nargs="*", default=[], help="names of rows or programs; omitted: all")
    parser.add_argument("--list", action="store_true", help="list the rows and end")
    add_options(parser)
    arguments = parser.parse_args()
    rows = chosen(available(ROWS), arguments.rows)
    if arguments.list:
        print("\n".join(f"{row.name:24} {row.program:14} {row.method}, {row.scheme}" for row in rows))
        return
    say("preparing the model, the text and the calibration text")
    subject = prepare(arguments)
    folder = arguments.out / "bench"
    calibration = folder / "quantized" / "calibration.npy"
    taken = calibration_windows(subject, arguments.data / CALIBRATION, calibration, samples=subject.samples)
    judge = Judge(subject.model, subject.text.ids, threads=arguments.threads)
    bench = Bench(subject, judge, calibration, folder, arguments.threads)
    results = []
    for number, row in enumerate(rows, start=1):
        say(f"row {number} of {len(rows)}: {row.name}")
        results.append(bench.result(row))
        say(" | ".join(_line(results[-1])))
    _publish(arguments.out, results, subject, samples=taken)


def _publish(out: Path, results: Sequence[Result], subject: Subject, *, samples: int) -> None:
    title = f"Quantization: {subject.described}, calibrated on {samples} of {CALIBRATION.name}"
    path = out / "bench" / "quantization.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plot("KL divergence against size", points(results)), encoding="utf-8")
    note = (
        "Judged by the float32 reference on dequantized weights; embedding and head in W8A16 g32 in every row but "
        f"those that say otherwise. Sizes are of the decoder's linears in a checkpoint of 16-bit scales. Plot: {path}"
    )
    publish_result(out, "quantization", title, f"{table(results)}\n\n{note}", [each.plain() for each in results])


if __name__ == "__main__":
    main()
