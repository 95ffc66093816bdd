"""Compares servers under load: tokens per second when always busy, and how long people wait at a given load.

All serve the same model on this machine and are asked the same by one load generator. Lengths and arrivals of requests
are those of a recorded trace, scaled down; prompts are people's own texts. All servers run all the time and take turns
in every kind of load, because the machine's speed changes from minute to minute: what counts is the ratio in a round.
"""

import argparse
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llmopt.benchmarks.builds import DEFAULT_MODEL, RECIPES, build, source_model
from llmopt.benchmarks.load.entrant import Entrant
from llmopt.benchmarks.load.figures import latency
from llmopt.benchmarks.load.phases import QUICK, Plan, Soaked, measure_round, soak, warm_up
from llmopt.benchmarks.load.plot import plot
from llmopt.benchmarks.load.servers import OURS, SERVERS, Subject
from llmopt.benchmarks.load.tables import busy_table, latency_panels, latency_table
from llmopt.benchmarks.load.workload import Workload, read_workload
from llmopt.benchmarks.report import publish_result, say
from llmopt.runtime.text import Tokenizer

__all__ = ["main"]

_RECIPE = f"{DEFAULT_MODEL}-int8-kv-int8.yaml"


def compare(entrants: Sequence[Entrant], subject: Subject, workload: Workload, plan: Plan, *, rounds: int) -> None:
    """Start the servers and measure all rounds; who goes first alternates. What was measured is in the entrants."""
    with ExitStack() as stack:
        for entrant in entrants:
            entrant.start(subject, stack)
        warm_up(entrants, workload)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            measure_round(entrants if number % 2 == 0 else entrants[::-1], workload, plan)


def soaked(entrant: Entrant, subject: Subject, workload: Workload, requests: int) -> Soaked | None:
    """The memory of a server of its own over many requests; None where it failed."""
    found: list[Soaked] = []
    with ExitStack() as stack:
        entrant.start(subject, stack)
        say(f"{requests} short requests: {entrant.name}")
        entrant.attempt(lambda: found.append(soak(entrant, workload, requests)))
    return found[0] if found else None


def plain(entrant: Entrant) -> dict[str, Any]:
    """What was measured of a server as JSON has it; times that are infinite are null."""
    measured = entrant.measured
    return {
        "server": entrant.name,
        "title": entrant.contender.title,
        "error": entrant.error,
        "tokens_per_second": {str(clients): rounds for clients, rounds in measured.throughput.items()},
        "loads": {
            str(load): [
                {name: _finite(value) for name, value in asdict(latency(answers)).items()} for answers in rounds
            ]
            for load, rounds in measured.open.items()
        },
        "prefix": {"new": [*map(_finite, measured.cold)], "seen": [*map(_finite, measured.warm)]},
        "peak_bytes": measured.peak_bytes,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def main() -> None:
    """Make what is missing, measure, print the tables, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with load_azure_conv and chat_*")
    parser.add_argument("--build", type=Path, help=f"omitted: recipes/{_RECIPE} is built")
    parser.add_argument("--servers", nargs="*", default=[], help=f"besides ours, of {', '.join(SERVERS)}; omitted: all")
    parser.add_argument(
        "--loads",
        nargs="*",
        type=float,
        help="shares of our throughput; omitted: 0.2 0.4 0.6 0.8, with --quick 0.4 0.8",
    )
    parser.add_argument("--rounds", type=int, help="omitted: 3, and 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes for every kind of load")
    parser.add_argument("--soak", type=int, default=0, help="short requests over which our memory is watched; 5000")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    out, names = arguments.out, dict.fromkeys([OURS, *(arguments.servers or SERVERS)])
    if unknown := names.keys() - SERVERS.keys():
        parser.error(f"no such server: {', '.join(sorted(unknown))}")
    directory = arguments.build or build(RECIPES / _RECIPE, out)[0]
    folder = out / "bench" / "serving"
    folder.mkdir(parents=True, exist_ok=True)
    subject = Subject(directory, source_model(directory), out, arguments.threads)
    workload = read_workload(arguments.data, Tokenizer(directory))
    plan = QUICK if arguments.quick else Plan()
    plan = plan if arguments.loads is None else replace(plan, loads=sorted(arguments.loads))
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    entrants = [Entrant(name, SERVERS[name], folder) for name in names]
    compare(entrants, subject, workload, plan, rounds=rounds)
    memory = None
    if arguments.soak:
        memory = soaked(Entrant(OURS, SERVERS[OURS], folder), subject, workload, arguments.soak)
    _publish(out, entrants, plan, memory, rounds=rounds, threads=arguments.threads)


def _publish(
    out: Path, entrants: Sequence[Entrant], plan: Plan, memory: Soaked | None, *, rounds: int, threads: int
) -> None:
    title = f"Servers of {DEFAULT_MODEL} under load, {threads} threads, rounds: {rounds}"
    picture = out / "bench" / "serving.svg"
    picture.write_text(plot(title, latency_panels(entrants)), encoding="utf-8")
    parts = [busy_table(entrants, plan.clients), latency_table(entrants, plan.loads, plan.open)]
    parts.append(
        "Loads are shares of the most tokens/s that ours did in the same round. "
        f"In brackets: times those of ours. Plot: {picture}"
    )
    if memory is not None:
        change = memory.last / memory.first - 1
        parts.append(
            f"Our resident memory over {memory.requests} short requests: {memory.first / 1e6:.1f} MB in the first "
            f"quarter, {memory.last / 1e6:.1f} MB in the last ({change:+.2%})."
        )
    data = {
        "plan": asdict(plan),
        "servers": [plain(entrant) for entrant in entrants],
        "soak": None if memory is None else asdict(memory),
    }
    publish_result(out, "serving", title, "\n\n".join(parts), data)


if __name__ == "__main__":
    main()
