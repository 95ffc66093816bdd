"""Talk to a build in the terminal."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmopt.optimizer.cli._executor_options import executor_of, executor_options

if TYPE_CHECKING:
    from llmopt.runtime.llm import LLM, Options

__all__ = ["command"]

_HELP = "/reset begins anew, /system TEXT sets the system message, /quit ends; Ctrl-C ends an answer"


@click.command("chat")
@click.argument("build", type=click.Path(path_type=Path))
@click.option("--prompt", help="Ask this one question, print the answer and end.")
@click.option("--system", help="The system message. [default: the model's own]")
@click.option("--max-tokens", default=512, show_default=True, type=click.IntRange(1), help="Longest answer.")
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0, 2), help="0 is greedy.")
@click.option("--seed", type=click.IntRange(0), help="Makes sampled answers repeatable.")
@click.option("--context", type=click.IntRange(2), help="Tokens of the whole conversation.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the engine. [default: all cores]")
@executor_options
@click.option("--force", is_flag=True, help="Use a build that missed its gates.")
def command(
    build: Path,
    prompt: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    context: int | None,
    threads: int | None,
    force: bool,
    **executor: Any,
) -> None:
    """Talk to BUILD in the terminal, or ask it one question with --prompt."""
    from llmopt.runtime.llm import LLM, Options
    from llmopt.runtime.sampler import Sampling

    options = Options(max_tokens=max_tokens, yields=True, sampling=Sampling(temperature=temperature, seed=seed))
    chosen = executor_of(executor)
    with LLM(build, slots=1, kept_slots=0, context=context, threads=threads, executor=chosen, force=force) as llm:
        talk = _Talk(llm, options, system)
        if prompt is not None:
            talk.ask(prompt)
            return
        click.echo(f"{build.resolve().name}: {_HELP}", err=True)
        while (line := _read_line()) is not None and talk.obey(line):
            pass


def _read_line() -> str | None:
    """The next line of the user; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


class _Talk:
    """A conversation: its messages so far, and the commands that change them."""

    def __init__(self, llm: "LLM", options: "Options", system: str | None) -> None:
        self._llm = llm
        self._options = options
        self._system = system
        self._messages: list[dict[str, str]] = []

    def obey(self, line: str) -> bool:
        """Do what one line says; False to end."""
        from llmopt.optimizer.errors import InputError

        word, _, rest = line.partition(" ")
        if word == "/quit":
            return False
        if word == "/reset":
            self._messages = []
        elif word == "/system":
            self._system, self._messages = rest or None, []
        elif word.startswith("/"):
            click.echo(_HELP, err=True)
        elif line:
            try:
                self.ask(line)
            except InputError as error:
                click.echo(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), err=True)
        return True

    def ask(self, question: str) -> None:
        """Print the answer as it is made, and remember both.

        Raises:
            LlmoptError: The conversation does not fit any more, or the engine failed.
        """
        from llmopt.optimizer.errors import LlmoptError

        system = [{"role": "system", "content": self._system}] if self._system is not None else []
        asked = [*self._messages, {"role": "user", "content": question}]
        pieces: list[str] = []
        try:
            for piece in self._llm.stream([system + asked], self._options):
                pieces.append(piece.text)
                click.echo(piece.text, nl=False)
                if piece.answer is not None and piece.answer.error is not None:
                    raise LlmoptError(f"the engine failed: {piece.answer.error}")
        except KeyboardInterrupt:
            click.echo(" [interrupted]", nl=False, err=True)
        click.echo()
        self._messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
