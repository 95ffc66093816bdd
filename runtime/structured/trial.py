"""A process of its own that compiles every grammar first: one that hangs, crashes or fills the memory ends only that.

llguidance cannot be interrupted, and it recurses as deep as a grammar's rules refer to each other: 36 kilobytes that a
client sends overflow the stack of 8 MiB, and others keep a core busy for minutes. Run as
``python -m llmopt.runtime.structured.trial`` it reads JSON, a line each: the tokenizer first, then constraints.
"""

import contextlib
import json
import resource
import subprocess
import sys
import threading
from multiprocessing.connection import wait
from typing import Any

import psutil

from llmopt.optimizer.errors import UnsupportedError
from llmopt.runtime.structured.constraint import Constraint, GrammarError, source_of
from llmopt.runtime.text import Tokenizer

__all__ = ["Trial", "compiled", "open_tokenizer"]

_START_SECONDS = 120.0  # to start and to read the tokenizer, on a machine that is busy with other things

# Threads of a server have 8 MiB: a grammar that passes here is far from the end of theirs.
_STACK_BYTES = 1 << 20
_LONGEST_PROBLEM = 500
_MEMORY_BYTES = 1 << 30  # beyond what is there when the tokenizer is read


class Trial:
    """The process, started when it is first needed and again after it has ended. One thread at a time may use it.

    Args:
        tokenizer: Of the build.
        end: The token that ends an answer.
        seconds: What a grammar may take.
    """

    def __init__(self, tokenizer: Tokenizer, end: int, *, seconds: float) -> None:
        self._tokenizer = tokenizer
        self._end = end
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, constraint: Constraint) -> str:
        """Compile it there.

        Returns:
            The grammar for llguidance, which can be compiled here.

        Raises:
            GrammarError: It cannot be compiled, or not within the time.
            UnsupportedError: The process does not start, or llguidance cannot use the tokenizer.
        """
        if self._process is None:
            self._start()
        answer = self._ask({"kind": constraint.kind, "text": constraint.text}, self._seconds)
        if answer is None:
            raise GrammarError(f"the grammar is too complex: compiling it took longer than {self._seconds:g} s")
        if "error" in answer:
            raise GrammarError(answer["error"])
        return str(answer["source"])

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        command = [sys.executable, "-P", "-m", "llmopt.runtime.structured.trial"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        answer = self._ask({"tokenizer": self._tokenizer.serialized(), "end": self._end}, _START_SECONDS)
        if answer is None or "error" in answer:
            self.close()
            why = "nothing came back" if answer is None else answer["error"]
            raise UnsupportedError(f"the process that compiles grammars did not start: {why}")

    def _ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The process's answer; None, and the process ended, where it took too long."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
        if not wait([process.stdout.fileno()], seconds):
            self.close()
            return None
        line = process.stdout.readline()
        if not line:
            self.close()
            return {"error": "the grammar is too complex: compiling it needs too much memory"}
        found: dict[str, Any] = json.loads(line)
        return found


def open_tokenizer(tokenizer: str, end: int) -> Any:
    """The tokenizer as llguidance has it.

    Args:
        tokenizer: The content of tokenizer.json.
        end: The token that ends an answer.

    Raises:
        UnsupportedError: It cannot use this one.
    """
    import llguidance

    try:
        return llguidance.LLTokenizer(tokenizer, eos_token=[end])
    except ValueError as error:
        raise UnsupportedError(f"llguidance cannot use this build's tokenizer: {error}") from error


def compiled(tokenizer: Any, source: str) -> Any:
    """The matcher of a grammar, at its beginning.

    Raises:
        GrammarError: The grammar is invalid, or something of it would be ignored.
    """
    import llguidance

    limits = llguidance.LLParserLimits(verbose_errors=False)
    _, problems = llguidance.LLMatcher.validate_grammar_with_warnings(source, tokenizer, limits=limits)
    matcher = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=limits)
    problem = problems[0] if problems else matcher.get_error()
    if problem:
        raise GrammarError(f"the grammar cannot be compiled: {_short(problem)}")
    return matcher


def _short(problem: str) -> str:
    """What llguidance says, without what it leaves out, and not the whole grammar again."""
    return problem.replace("<non-verbose/>", "").strip()[:_LONGEST_PROBLEM]


def _main() -> None:
    first = json.loads(sys.stdin.readline())
    try:
        tokenizer = open_tokenizer(first["tokenizer"], first["end"])
    except UnsupportedError as error:
        _answer({"error": error.message})
        return
    allowed = psutil.Process().memory_info().vms + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    threading.stack_size(_STACK_BYTES)
    _answer({})
    for line in sys.stdin:
        answers: list[dict[str, Any]] = []
        # A thread for its small stack.
        thread = threading.Thread(target=_try, args=(tokenizer, Constraint(**json.loads(line)), answers))
        thread.start()
        thread.join()
        if not answers:
            return  # it failed in a way that nobody foresaw, and the parent takes that for a crash
        _answer(answers[0])


def _try(tokenizer: Any, constraint: Constraint, answers: list[dict[str, Any]]) -> None:
    try:
        answers.append({"source": _tried(tokenizer, constraint)})
    except GrammarError as error:
        answers.append({"error": error.message})


def _tried(tokenizer: Any, constraint: Constraint) -> str:
    source = source_of(constraint)
    matcher = compiled(tokenizer, source)
    # Some grammars turn out to be too large, or to allow nothing, only at the first token.
    matcher.compute_bitmask()
    if problem := matcher.get_error():
        raise GrammarError(f"the grammar allows nothing: {_short(problem)}")
    return source


def _answer(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)  # noqa: T201 - the protocol


if __name__ == "__main__":
    _main()
