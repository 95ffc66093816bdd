"""Compares builds of an encoder in float32 and W8A8 with each other and with sentence-transformers.

Every program is loaded once in a process of its own, and they encode the same texts in turn: the machine's speed
changes from minute to minute, so the ratio within a round is what counts.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from llmopt.benchmarks.builds import RECIPES, build
from llmopt.benchmarks.child import ChildError
from llmopt.benchmarks.loaders.programs import SENTENCE_TRANSFORMERS
from llmopt.benchmarks.peer import installed
from llmopt.benchmarks.report import markdown, publish_result, say
from llmopt.optimizer.cache import cache_root
from llmopt.optimizer.manifest import Manifest
from llmopt.optimizer.sources import locate

__all__ = ["main", "rows_of"]

_RECIPE = RECIPES / "all-minilm-l6-v2-int8.yaml"


@dataclass(slots=True)
class Program:
    """One program, running.

    Attributes:
        title: As printed.
        process: Of ``encode_texts.py``.
        seconds: Of each round.
        vectors: float32 ``[texts, dimensions]``.
    """

    title: str
    process: "subprocess.Popen[str]"
    seconds: list[float] = field(default_factory=list)
    vectors: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def ask(self, command: str) -> str:
        """Its answer to one line.

        Raises:
            ChildError: It has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if command:
            self.process.stdin.write(f"{command}\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise ChildError(f"{self.title} has ended with {self.process.wait()}", hint="see what it said above")
        return answer.strip()


def start(title: str, kind: str, path: Path, python: Path, arguments: argparse.Namespace, texts: Path) -> Program:
    """Start a program and wait until it has encoded all texts once."""
    say(f"loading {title}")
    order = {
        "kind": kind,
        "path": str(path),
        "texts": str(texts),
        "threads": arguments.threads,
        "batch": arguments.batch,
    }
    script = Path(__file__).with_name("encode_texts.py")
    process = subprocess.Popen(
        [str(python), str(script), json.dumps(order)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    program = Program(title, process)
    while program.ask("") != "ready":
        pass
    return program


def rows_of(programs: Sequence[Program], texts: int) -> list[list[str]]:
    """Of each program texts/s, the ratio to the first one by round, and the cosine of its vectors with the first's."""
    first = programs[0]
    rows = []
    for program in programs:
        ratios = [a / b for a, b in zip(first.seconds, program.seconds, strict=True)]
        cosine = (first.vectors * program.vectors).sum(1)
        rows.append(
            [
                program.title,
                f"{texts / median(program.seconds):,.0f}",
                f"{median(ratios):.2f}",
                f"{min(ratios):.2f} - {max(ratios):.2f}",
                f"{cosine.mean():.5f}",
                f"{cosine.min():.5f}",
            ]
        )
    return rows


def _float_recipe(out: Path, recipe: Path = _RECIPE) -> Path:
    """The recipe without its passes."""
    text = recipe.read_text("utf-8")
    before, _, behind = text.partition("passes:\n")
    texts = (recipe.parent / "texts").resolve()
    plain = f"{before}passes: []\n{behind[behind.index('export:') :]}".replace("texts/", f"{texts}/")
    path = out / "bench" / "all-minilm-l6-v2-fp32.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plain, encoding="utf-8")
    return path


def main() -> None:
    """Make what is missing, measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=RECIPES / "texts/sentences.txt", help="a text on each line")
    parser.add_argument("--builds", type=Path, nargs=2, metavar=("FP32", "INT8"), help="omitted: they are made")
    parser.add_argument("--peer", type=Path, help="a Python with sentence-transformers[onnx]; omitted: it is installed")
    parser.add_argument("--alone", action="store_true", help="without sentence-transformers")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    out: Path = arguments.out
    plain, rounded = arguments.builds or (build(_float_recipe(out), out)[0], build(_RECIPE, out)[0])
    lines = [line.strip() for line in arguments.data.read_text("utf-8").splitlines() if line.strip()]
    texts = out / "bench" / "encoder-texts.txt"
    texts.parent.mkdir(parents=True, exist_ok=True)
    texts.write_text("\n".join(lines), encoding="utf-8")
    ours = Path(sys.executable)
    wanted = [("llmopt, float32", "llmopt", plain, ours), ("llmopt, W8A8", "llmopt", rounded, ours)]
    if not arguments.alone:
        peer = arguments.peer or installed(SENTENCE_TRANSFORMERS, out / "bench" / "loaders" / "sentence_transformers")
        checkpoint = locate(Manifest.load(plain).source.spec, cache=cache_root(), base=RECIPES)
        wanted += [
            ("sentence-transformers, torch", "torch", checkpoint, peer),
            ("sentence-transformers, own ONNX", "onnx", checkpoint, peer),
            ("sentence-transformers, own int8", "onnx-int8", checkpoint, peer),
            ("sentence-transformers, engine float32", "engine", plain, peer),
            ("sentence-transformers, engine W8A8", "engine", rounded, peer),
        ]
    programs = [start(*each, arguments, texts.absolute()) for each in wanted]
    for number in range(arguments.rounds):
        say(f"round {number + 1} of {arguments.rounds}")
        for program in programs if number % 2 == 0 else reversed(programs):
            program.seconds.append(float(program.ask("run")))
    for number, program in enumerate(programs):
        path = out.absolute() / "bench" / f"vectors-{number}.npy"
        program.ask(f"save {path}")
        program.vectors = np.load(path)
        assert program.process.stdin is not None
        program.process.stdin.close()
        program.process.wait()
    header = ["", "texts/s", "times float32", "by round", "mean cosine", "smallest"]
    title = (
        f"{len(lines)} texts in batches of {arguments.batch}, {arguments.threads} threads, {arguments.rounds} rounds"
    )
    data = {program.title: program.seconds for program in programs}
    publish_result(out, "encoders", title, markdown(header, rows_of(programs, len(lines))), data)


if __name__ == "__main__":
    main()
