"""Continue a text with a build, or answer a file of prompts."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmopt.optimizer.cli._engine_options import choices_of, engine_options, opening_of

if TYPE_CHECKING:
    from llmopt.runtime.llm import LLM, Options

__all__ = ["command"]

_EVERY = 5.0
"""Seconds between two words about progress."""


@click.command("generate")
@click.argument("build", type=click.Path(path_type=Path))
@click.option("--prompt", help="The text to continue; read from standard input when omitted.")
@click.option("--prompts", type=click.Path(path_type=Path), help="A file of prompts instead, JSON lines.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Where their answers go, JSON lines; goes on where it ended."
)
@click.option("--max-tokens", default=128, show_default=True, type=click.IntRange(1), help="Longest continuation.")
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0, 2), help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--seed", type=click.IntRange(0), help="Makes sampled continuations repeatable.")
@engine_options
@click.option("--force", is_flag=True, help="Use a build that missed its gates.")
def command(
    build: Path,
    prompt: str | None,
    prompts: Path | None,
    out: Path | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    force: bool,
    **options: Any,
) -> None:
    """Print what BUILD continues a text with, without a chat template; or answer all prompts of a file.

    A line of the file is a JSON object with 'prompt' (a text), 'messages' (a conversation), 'turns' (what a user says
    one after the other) or 'ids' (tokens), and maybe 'id' and 'max_tokens'.
    """
    from llmopt.optimizer.errors import InputError
    from llmopt.runtime.llm import LLM, Options
    from llmopt.runtime.prompt_file import read_prompts
    from llmopt.runtime.sampler import Sampling

    if (prompts is None) != (out is None):
        raise InputError("--prompts and --out belong together", hint="--prompts in.jsonl --out out.jsonl")
    if prompts is not None and prompt is not None:
        raise InputError("--prompt is one text, --prompts a file of many: give one of them")
    asked = None if prompts is None else read_prompts(prompts)
    choices = choices_of(options)
    sizes = opening_of(options) if asked is not None else opening_of(options) | {"slots": 1, "kept_slots": 0}
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    wanted = Options(max_tokens=max_tokens, yields=asked is None, sampling=sampling)
    text = sys.stdin.read() if asked is None and prompt is None else prompt
    with LLM(build, **sizes, choices=choices, force=force) as llm:
        if asked is None or out is None:
            _continue(llm, text or "", wanted)
        else:
            _answer(llm, asked, out, wanted)


def _continue(llm: "LLM", text: str, wanted: "Options") -> None:
    from llmopt.optimizer.errors import LlmoptError

    for piece in llm.stream([text], wanted):
        click.echo(piece.text, nl=False)
        if piece.answer is not None and piece.answer.error is not None:
            raise LlmoptError(f"the engine failed: {piece.answer.error}")
    click.echo()


def _answer(llm: "LLM", asked: list[Any], out: Path, wanted: "Options") -> None:
    from llmopt.optimizer.errors import LlmoptError
    from llmopt.runtime.prompt_file import AnswerFile, answer_all

    file = AnswerFile(out, asked, {"build": llm.build.fingerprint, "options": wanted})
    left = [each for each in asked if each.line not in file.done]
    if len(left) < len(asked):
        click.echo(f"{len(asked) - len(left)} of {len(asked)} prompts were answered before", err=True)
    progress, failed = _Progress(len(left)), 0
    try:
        for news in answer_all(llm, left, wanted):
            if isinstance(news, int):
                progress.tokens += news
            else:
                file.add(*news)
                failed += news[1][-1].error is not None
                progress.tokens += 1
                progress.answered += 1
            progress.show()
    finally:
        file.close()
    progress.show(at_once=True)
    if failed:
        raise LlmoptError(f"{failed} prompts failed; {out} says why", hint="run the command again to ask them again")


class _Progress:
    """How far it is, said every few seconds on standard error; on a terminal in one line."""

    def __init__(self, total: int) -> None:
        self.tokens = 0
        self.answered = 0
        self._total = total
        self._began = self._said = time.monotonic()

    def show(self, *, at_once: bool = False) -> None:
        """Say it, if it is time."""
        now = time.monotonic()
        is_terminal = sys.stderr.isatty()
        if not at_once and now - self._said < (0.2 if is_terminal else _EVERY):
            return
        self._said = now
        speed = self.tokens / max(now - self._began, 1e-9)
        text = f"{self.answered} of {self._total} prompts answered, {self.tokens} tokens, {speed:.0f} tokens/s"
        click.echo(f"\r{text}\x1b[K" if is_terminal else text, nl=at_once or not is_terminal, err=True)
