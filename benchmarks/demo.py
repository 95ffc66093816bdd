"""The whole path on a real model: build SmolLM2, ask the served engine a question, print its accuracy and speed."""

import argparse
import subprocess
import sys
from pathlib import Path

from llmopt.benchmarks.builds import DEFAULT_MODEL, RECIPES
from llmopt.benchmarks.child import ChildError, llmopt_command
from llmopt.benchmarks.server import running_server
from llmopt.optimizer.errors import LlmoptError

__all__ = ["main"]

QUESTION = "What is the capital of France?"
EXPECTED = "Paris"


def show(*arguments: str) -> None:
    """Print an llmopt command and run it, with its output where the user sees it.

    Raises:
        ChildError: It failed.
    """
    print(f"\n$ llmopt {' '.join(arguments)}", flush=True)
    code = subprocess.run([llmopt_command(), *arguments], stdin=subprocess.DEVNULL, check=False).returncode
    if code:
        raise ChildError(f"llmopt {arguments[0]} ended with {code}")


def ask(directory: Path, log: Path) -> None:
    """Serve the build, ask ``QUESTION`` over HTTP, print the answer.

    Raises:
        ChildError: The server did not start, or the answer is wrong.
    """
    print(f"\n$ llmopt serve {directory}", flush=True)
    with running_server(directory, log=log) as server:
        print(f"{server.url} answers after {server.seconds_to_start:.1f} s\n", flush=True)
        answer = server.chat(QUESTION)
    print(f"  question  {QUESTION}\n  answer    {answer}", flush=True)
    if EXPECTED not in answer:
        raise ChildError(f"the answer does not contain {EXPECTED!r}")


def main() -> int:
    """Run every step; 0 when all went well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    directory = arguments.out / "demo"
    try:
        show("build", str(RECIPES / f"{DEFAULT_MODEL}-int8.yaml"), "-o", str(directory), "--force")
        ask(directory, arguments.out / "demo-server.log")
        show("inspect", str(directory))
        show("bench", str(directory))
    except LlmoptError as error:
        print(f"\nerror: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
