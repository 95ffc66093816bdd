"""What is measured, one kind of load after the other; in each the servers take turns, and so meet the same machine.

The machine's speed changes from minute to minute: a load is a share of what ours did in the same round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from threading import Event, Thread

import psutil

from llmopt.benchmarks.load.entrant import Entrant
from llmopt.benchmarks.load.figures import first_token, throughput
from llmopt.benchmarks.load.servers import OURS
from llmopt.benchmarks.load.trace import arrivals
from llmopt.benchmarks.load.workload import Job, Workload
from llmopt.benchmarks.report import say

__all__ = ["QUICK", "Plan", "Soaked", "measure_round", "soak", "warm_up"]

_MOST_REQUESTS = 25
"""Per second, that one server could answer: as many are held ready for clients that are always busy."""

_PREFIX_TOKENS, _QUESTION_TOKENS, _PREFIX_ANSWER = 1000, 24, 8

_SOAK_CLIENTS, _SOAK_PROMPT, _SOAK_ANSWER = 16, 16, 8

_SAMPLE = 0.2
"""Seconds between two looks at a process's memory."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how much.

    Attributes:
        clients: That are always busy, one run for each number.
        saturated: Seconds of such a run.
        warm: Of them, those at the beginning that do not count.
        loads: Shares of the most that ours did in the same round.
        open: Seconds in which requests arrive.
        patience: Seconds after which requests without an answer are given up.
        prefixes: That are tried.
    """

    clients: Sequence[int] = (16, 32)
    saturated: float = 60.0
    warm: float = 10.0
    loads: Sequence[float] = (0.2, 0.4, 0.6, 0.8)
    open: float = 60.0
    patience: float = 30.0
    prefixes: int = 5


QUICK = Plan(saturated=30.0, warm=10.0, loads=(0.4, 0.8), open=20.0, patience=10.0, prefixes=2)
"""A few minutes for four servers."""


def measure_round(entrants: Sequence[Entrant], workload: Workload, plan: Plan) -> None:
    """All of the plan once.

    Args:
        entrants: In the order in which they take turns; one of them is ours.
        workload: Of all.
        plan: How long and how much.
    """
    for clients in plan.clients:
        jobs = workload.take(int(plan.saturated * _MOST_REQUESTS) + clients)
        for entrant in entrants:
            say(f"{clients} clients, {plan.saturated:.0f} s: {entrant.name}")
            entrant.attempt(partial(_saturate, entrant, jobs, clients, plan))
    ours = next(entrant for entrant in entrants if entrant.name == OURS)
    if ours.error is not None:
        return
    for load in plan.loads:
        rate = load * max(rounds[-1] for rounds in ours.measured.throughput.values())
        start = workload.place
        jobs = workload.take(int(plan.open * _MOST_REQUESTS))
        times = arrivals(workload.trace, start, [job.max_tokens for job in jobs], rate=rate, seconds=plan.open)
        for entrant in entrants:
            say(f"load {load:.0%}, {len(times)} requests in {plan.open:.0f} s: {entrant.name}")
            entrant.attempt(partial(_arrive, entrant, jobs[: len(times)], times, load, plan))
    for _ in range(plan.prefixes):
        pair = _pair(workload)
        for entrant in entrants:
            say(f"a prefix of {_PREFIX_TOKENS} tokens: {entrant.name}")
            entrant.attempt(partial(_reuse, entrant, pair))


def warm_up(entrants: Sequence[Entrant], workload: Workload) -> None:
    """A few requests to each, which count for nothing."""
    jobs = workload.take(4)
    for entrant in entrants:
        entrant.attempt(partial(_warm, entrant, jobs))


@dataclass(frozen=True, slots=True)
class Soaked:
    """A server's resident memory in bytes over many requests: the medians of the first and the last quarter of them."""

    requests: int
    first: float
    last: float


def soak(entrant: Entrant, workload: Workload, requests: int) -> Soaked:
    """Ask for many short answers, and watch the memory of the server meanwhile.

    Raises:
        ChildError: See ``Entrant.ask``.
    """
    jobs = [workload.job(_SOAK_PROMPT, _SOAK_ANSWER) for _ in range(requests)]
    samples: list[int] = []
    process, over = psutil.Process(entrant.process), Event()

    def watch() -> None:
        while not over.wait(_SAMPLE):
            samples.append(process.memory_info().rss)

    watcher = Thread(target=watch)
    watcher.start()
    try:
        entrant.ask(jobs, clients=_SOAK_CLIENTS, seconds=None)
    finally:
        over.set()
        watcher.join()
    quarter = max(len(samples) // 4, 1)
    return Soaked(requests, median(samples[:quarter]), median(samples[-quarter:]))


def _saturate(entrant: Entrant, jobs: Sequence[Job], clients: int, plan: Plan) -> None:
    answers = entrant.ask(jobs, clients=clients, seconds=plan.saturated)
    tokens = [job.max_tokens for job in jobs]
    found = throughput(answers, tokens, start=plan.warm, end=plan.saturated)
    entrant.measured.throughput.setdefault(clients, []).append(found)


def _arrive(entrant: Entrant, jobs: Sequence[Job], times: Sequence[float], load: float, plan: Plan) -> None:
    patience = plan.open - times[-1] + plan.patience
    answers = entrant.ask(jobs, times=list(times), patience=patience)
    entrant.measured.open.setdefault(load, []).append(answers)


def _pair(workload: Workload) -> list[Job]:
    """Two questions about one long text that nobody has seen."""
    prefix = workload.job(_PREFIX_TOKENS, 1).prompt
    return [workload.job(_QUESTION_TOKENS, _PREFIX_ANSWER, behind=prefix) for _ in range(2)]


def _reuse(entrant: Entrant, pair: Sequence[Job]) -> None:
    cold, warm = entrant.ask(pair, clients=1, seconds=None)
    entrant.measured.cold.append(first_token(cold))
    entrant.measured.warm.append(first_token(warm))


def _warm(entrant: Entrant, jobs: Sequence[Job]) -> None:
    entrant.ask(jobs, clients=2, seconds=None)
