"""Measures how long ``llmopt serve`` takes from the start of the process until ``/health`` answers 200."""

import argparse
from pathlib import Path
from statistics import median

from llmopt.benchmarks.builds import DEFAULT_MODEL, RECIPES, build
from llmopt.benchmarks.report import markdown, publish_result
from llmopt.benchmarks.server import running_server

__all__ = ["main"]


def main() -> None:
    """Start and stop the server several times and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--build", type=Path, help=f"a build; omitted: recipes/{DEFAULT_MODEL}-int8.yaml is built")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    directory = arguments.build or build(RECIPES / f"{DEFAULT_MODEL}-int8.yaml", arguments.out)[0]
    seconds = []
    for _ in range(arguments.rounds):
        with running_server(directory, log=arguments.out / "bench" / "server.log") as server:
            seconds.append(server.seconds_to_start)
    row = [directory.name, f"{median(seconds):.2f}", f"{min(seconds):.2f} - {max(seconds):.2f}"]
    table = markdown(["seconds until /health gives 200", "median", "range"], [row])
    publish_result(arguments.out, "server_start", "Start of the server", table, {"seconds": seconds})


if __name__ == "__main__":
    main()
