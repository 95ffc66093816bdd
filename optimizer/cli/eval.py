"""Measure a build against its source model again."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmopt.optimizer.cli._executor_options import executor_of, executor_options

if TYPE_CHECKING:
    from llmopt.evaluation.again import Result

__all__ = ["command"]


@click.command()
@click.argument("build", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), multiple=True, help="A text file; may be repeated.")
@click.option(
    "--windows", type=click.IntRange(min=1), help="Windows of texts that no gate names.  [default: 8; sampled text: 16]"
)
@click.option(
    "--tokens", type=click.IntRange(min=2), help="Tokens per window of such texts.  [default: 1024; sampled text: 128]"
)
@click.option("--source", metavar="SPEC", help="Where the source model is, if not where the build found it.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads.  [default: one per core]")
@executor_options
@click.option("--offline", is_flag=True, help="Download nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print events and the result as JSON lines.")
def command(
    build: Path,
    data: tuple[Path, ...],
    windows: int | None,
    tokens: int | None,
    source: str | None,
    threads: int | None,
    offline: bool,
    as_json: bool,
    **executor: Any,
) -> None:
    """Measure a build against its source model again.

    Without --data, the gates of the build's recipe say which text; a gate with a file of its own needs that file among
    --data. Where nothing is given, text is sampled from the source model. The build is not changed.

    Exits with 4 when a gate is missed.
    """
    import os

    from llmopt.evaluation.again import Question, evaluate
    from llmopt.optimizer.errors import RejectedError
    from llmopt.optimizer.progress import choose

    progress = choose(as_json=as_json)
    cores = len(os.sched_getaffinity(0))
    chosen = executor_of(executor)
    question = Question(data, windows, tokens, source, threads=threads or cores, offline=offline, executor=chosen)
    result = evaluate(build, question, progress)
    progress.result(
        {
            "measurements": [each.model_dump(mode="json") for each in result.measurements],
            "verdict": result.verdict.model_dump(mode="json"),
            "not_judged": [gate.describe() for gate in result.not_judged],
            "notes": result.notes,
        }
    )
    if not as_json:
        _print(result)
    missed = [each for each in result.verdict.gates if not each.passed]
    if missed:
        raise RejectedError(f"{build} misses {len(missed)} of {len(result.verdict.gates)} gates")


def _print(result: "Result") -> None:
    from llmopt.optimizer.cli._console import open_console
    from llmopt.optimizer.cli._tables import gates_table, measurements_table

    console = open_console()
    console.print(measurements_table(result.measurements))
    if result.verdict.gates:
        console.print(gates_table(result.verdict))
    for gate in result.not_judged:
        console.print(f"not judged: {gate.metric} on {gate.data}; give that file with --data")
    for note in result.notes:
        console.print(f"note: {note}")
