"""Runs every benchmark, one after the other: ``make bench``."""

import argparse
import subprocess
import sys
from pathlib import Path

__all__ = ["main"]

WITH_TEXT = ("against_genai", "accuracy", "fp32_parity")
OTHERS = ("server_start", "build_cost")


def main() -> int:
    """Run them; 1 when one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="a text, as WikiText-2's wiki.valid.tokens; omitted: sampled text")
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    failed = []
    for name in (*WITH_TEXT, *OTHERS):
        command = [sys.executable, "-m", f"llmopt.benchmarks.{name}", "--out", str(arguments.out)]
        if arguments.data and name in WITH_TEXT:
            command += ["--data", str(arguments.data)]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
