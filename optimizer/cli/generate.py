"""Continue a text with a build."""

import sys
from pathlib import Path

import click

__all__ = ["command"]


@click.command("generate")
@click.argument("build", type=click.Path(path_type=Path))
@click.option("--prompt", help="The text to continue; read from standard input when omitted.")
@click.option("--max-tokens", default=128, show_default=True, type=click.IntRange(1), help="Longest continuation.")
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0, 2), help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--seed", type=click.IntRange(0), help="Makes a sampled continuation repeatable.")
@click.option("--context", type=click.IntRange(2), help="Tokens, prompt and continuation.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the engine. [default: all cores]")
@click.option("--force", is_flag=True, help="Use a build that missed its gates.")
def command(
    build: Path,
    prompt: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    context: int | None,
    threads: int | None,
    force: bool,
) -> None:
    """Print what BUILD continues a text with, without a chat template."""
    from llmopt.runtime.build import open_build
    from llmopt.runtime.conversation import speaking
    from llmopt.runtime.sampler import Sampling

    text = sys.stdin.read() if prompt is None else prompt
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    opened = open_build(build, slots=1, context=context, threads=threads, force=force)
    with speaking(opened) as speaker:
        for piece in speaker.complete(text, sampling, max_tokens=max_tokens):
            click.echo(piece, nl=False)
    click.echo()
