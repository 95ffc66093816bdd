"""How results leave a benchmark: a markdown table on standard output and JSON under ``out/bench/``."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmopt.benchmarks.machine import describe

__all__ = ["markdown", "publish_result", "say"]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first column is text and the others are figures."""
    lines = [header, [":--", *("--:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def publish_result(out: Path, name: str, title: str, table: str, data: Any) -> None:
    """Print ``table`` with the machine it holds for, and write ``data`` to ``out/bench/NAME.json``."""
    machine = describe()
    path = out / "bench" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, "machine": machine.model_dump(), "results": data}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"\n## {title}\n\n{machine.line()}\n\n{table}\n\n({path})", flush=True)


def say(text: str) -> None:
    """One line of progress on standard error."""
    print(text, file=sys.stderr, flush=True)
