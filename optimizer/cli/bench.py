"""Measure a build's speed and memory."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmopt.optimizer.cli._executor_options import executor_of, executor_options

if TYPE_CHECKING:
    from llmopt.evaluation.speed import Rate, Speed

__all__ = ["command"]


def _shapes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """``512`` -> one prompt of 512 tokens, ``128x8`` -> eight of 128; as (sequences, tokens)."""
    shapes = []
    for value in values:
        match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", value)
        if match is None:
            raise click.BadParameter(
                f"{value!r} is no prompt shape; write 512, or 128x8 for eight prompts of 128 tokens", ctx, param
            )
        shapes.append((int(match[2] or 1), int(match[1])))
    return tuple(dict.fromkeys(shapes))


def _sizes(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """``1,4,8`` -> (1, 4, 8)."""
    if value is None:
        return None
    sizes = [part.strip() for part in value.split(",")]
    if not all(re.fullmatch(r"[1-9]\d*", size) for size in sizes):
        raise click.BadParameter(f"{value!r} is no list of batch sizes; write 1,4,8,16", ctx, param)
    return tuple(dict.fromkeys(int(size) for size in sizes))


@click.command()
@click.argument("build", type=click.Path(path_type=Path))
@click.option(
    "--prompt",
    "prompts",
    metavar="TOKENS[xPROMPTS]",
    multiple=True,
    callback=_shapes,
    help="Prompts to prefill, or texts to encode; may be repeated.  [default: 512, 128x8; encoders: 32, 32x32, 128x32]",
)
@click.option(
    "--batch",
    "batches",
    metavar="N,N,...",
    callback=_sizes,
    help="Sequences decoded together.  [default: 1,4,8,16; encoders: none]",
)
@click.option("--past", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens held before decoding.")
@click.option("--decode", "steps", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens decoded.")
@click.option("--repeat", "repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads.  [default: one per core]")
@executor_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    build: Path,
    prompts: tuple[tuple[int, int], ...],
    batches: tuple[int, ...] | None,
    past: int,
    steps: int,
    repeats: int,
    threads: int | None,
    as_json: bool,
    **executor: Any,
) -> None:
    """Measure a build's speed and memory.

    Each shape runs once per round, after one round that is not timed; figures are medians over the rounds. The spread
    is the difference between the slowest and the fastest round.
    """
    import json
    import os
    from dataclasses import asdict

    from llmopt.evaluation.speed import Plan, measure_speed
    from llmopt.optimizer.manifest import Manifest
    from llmopt.runtime.backends.opening import pick_engine

    manifest, chosen = Manifest.load(build), executor_of(executor)
    of_encoder = bool(manifest.encoders)
    if batches is None:
        most = 0 if of_encoder else pick_engine(build, manifest, chosen).slots or 16
        batches = tuple(size for size in (1, 4, 8, 16) if size <= most)
    prompts = prompts or (((1, 32), (32, 32), (32, 128)) if of_encoder else ((1, 512), (8, 128)))
    cores = len(os.sched_getaffinity(0))
    plan = Plan(prompts, batches, past=past, steps=steps, repeats=repeats, threads=threads or cores, executor=chosen)
    speed = measure_speed(build, plan)
    if as_json:
        click.echo(json.dumps(asdict(speed)))
    else:
        _print(speed)


def _print(speed: "Speed") -> None:
    from rich import box
    from rich.table import Table

    from llmopt.optimizer.cli._console import open_console

    console = open_console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    unit = "texts/s" if any(rate.kind == "encode" for rate in speed.rates) else "tokens/s"
    for name in ("shape", unit, "spread", "latency"):
        table.add_column(name, justify="right")
    for rate in speed.rates:
        table.add_row(*_row(rate))
    console.print(table)
    console.print(
        f"load {speed.load_seconds:.2f} s, peak memory {speed.peak_bytes / 1e6:,.0f} MB, threads {speed.threads}"
    )
    console.print(f"CPU: {', '.join(speed.cpu_features) or 'no known matrix instructions'}")


def _row(rate: "Rate") -> tuple[str, ...]:
    milliseconds = f"{rate.latency * 1000:,.1f} ms"
    if rate.kind == "encode":
        shape, meaning = f"{rate.sequences} x {rate.tokens}", "to all" if rate.sequences > 1 else "to the vector"
    elif rate.kind == "prefill":
        shape, meaning = f"{rate.sequences} x {rate.tokens}", "to first token" if rate.sequences == 1 else "to all"
    else:
        shape, meaning = f"{rate.sequences} after {rate.tokens}", "a token"
    return rate.kind, shape, f"{rate.rate:,.0f}", f"{rate.spread:.0%}", f"{milliseconds} {meaning}"
