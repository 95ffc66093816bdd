"""What servers are asked: prompts of people's own texts in the lengths of a trace, no two with the same beginning."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmopt.benchmarks.load.trace import Trace, read_trace
from llmopt.optimizer.errors import InputError
from llmopt.runtime.text import Tokenizer

__all__ = ["Job", "Workload", "read_workload"]

TRACE = Path("load_azure_conv/azure_conv.csv")
PROMPTS = "chat_*/prompts.jsonl"
"""Below the folder of data."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request.

    Attributes:
        prompt: The text.
        prompt_tokens: Of it.
        max_tokens: Exactly as many are generated.
    """

    prompt: str
    prompt_tokens: int
    max_tokens: int


class Workload:
    """A stream of jobs. Every one is handed out once, so that nobody has seen it before.

    Args:
        trace: Lengths, from its first request on, over and over.
        texts: What prompts are made of.
        tokenizer: Counts.

    Attributes:
        trace: The same.
        place: Of the next job in the trace.
    """

    def __init__(self, trace: Trace, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        self.trace = trace
        self.place = 0
        self._tokenizer = tokenizer
        self._ids = [tokenizer.encode(f"{text}\n", add_special_tokens=False) for text in texts]
        self._made = 0

    def take(self, count: int) -> list[Job]:
        """The next jobs of the trace."""
        requests = len(self.trace.context)
        places = [(self.place + number) % requests for number in range(count)]
        self.place = (self.place + count) % requests
        return [self.job(self.trace.context[place], self.trace.generated[place]) for place in places]

    def job(self, prompt_tokens: int, max_tokens: int, *, behind: str = "") -> Job:
        """A prompt of about as many tokens as wanted: a number, which no other has, and then texts as they come.

        Args:
            prompt_tokens: Wanted, without what it lies behind.
            max_tokens: Of the answer.
            behind: A beginning that it shares with others.
        """
        self._made += 1
        ids = self._tokenizer.encode(f"{self._made}. ", add_special_tokens=False)
        text = self._made
        while len(ids) < prompt_tokens:
            ids = ids + self._ids[text % len(self._ids)]
            text += 1
        prompt = behind + self._tokenizer.decode(ids[:prompt_tokens]).rstrip("\ufffd")
        return Job(prompt, len(self._tokenizer.encode(prompt, add_special_tokens=True)), max_tokens)


def read_workload(data: Path, tokenizer: Tokenizer) -> Workload:
    """The trace and the prompts below ``data``.

    Raises:
        InputError: One of them is missing.
    """
    texts = [
        turn
        for path in sorted(data.glob(PROMPTS))
        for line in path.read_text("utf-8").splitlines()
        if line.strip()
        for turn in json.loads(line).get("turns", [])
    ]
    if not texts:
        raise InputError(f"{data} has no {PROMPTS}", hint="lines of JSON with a list of texts named turns")
    return Workload(read_trace(data / TRACE), texts, tokenizer)
