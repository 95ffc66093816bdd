"""Compares a build with onnxruntime-genai's int4 CPU engine: same machine, same shapes, alternating, as ratios.

Both engines run in the same version of ONNX Runtime with the same number of threads, each round in a fresh process.
The machine's speed changes from minute to minute, so each round is compared with itself and the ratio is what counts.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

import numpy as np

from llmopt.benchmarks.builds import DEFAULT_MODEL, RECIPES, build, source_model
from llmopt.benchmarks.child import run
from llmopt.benchmarks.genai_peer import GENAI_VERSION, make_peer
from llmopt.benchmarks.report import markdown, publish_result, say
from llmopt.benchmarks.texts import plain_text, tokens_of

__all__ = ["compare", "main"]

FED = 2048
"""Tokens taken from the text; the largest shapes use 16 sequences of 128."""

Speeds = dict[str, float]


def compare(ours: Path, peer: Path, *, rounds: int, threads: int, tokens: Path | None, out: Path) -> list[list[Speeds]]:
    """Measure both in turn; who goes first alternates.

    Returns:
        For each round the speeds of ours and of the peer, in tokens per second.
    """
    measured = []
    for number in range(rounds):
        found: dict[str, Speeds] = {}
        order = [("llmopt", ours), ("genai", peer)]
        for kind, path in order if number % 2 == 0 else reversed(order):
            say(f"round {number + 1} of {rounds}: {kind}")
            command = [sys.executable, "-m", "llmopt.benchmarks.decoder_speed", kind, str(path)]
            command += ["--threads", str(threads), *(["--tokens", str(tokens)] if tokens else [])]
            found[kind] = json.loads(run(command, log=out / "bench" / f"speed-{kind}.log").output)
        measured.append([found["llmopt"], found["genai"]])
    return measured


def table(rounds: list[list[Speeds]]) -> str:
    """Medians over the rounds, the median ratio, and the smallest and largest ratio of a round."""
    rows = []
    for shape in rounds[0][0]:
        ours, peer = [each[0][shape] for each in rounds], [each[1][shape] for each in rounds]
        ratios = [a / b for a, b in zip(ours, peer, strict=True)]
        figures = f"{median(ours):,.0f}", f"{median(peer):,.0f}", f"{median(ratios):.2f}"
        rows.append([shape, *figures, f"{min(ratios):.2f} - {max(ratios):.2f}"])
    return markdown(["tokens/s", "llmopt", "genai int4", "ratio", "ratio by round"], rows)


def main() -> None:
    """Make both engines where they are missing, measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="a text file whose tokens are fed; omitted: random tokens")
    parser.add_argument(
        "--build", type=Path, help=f"a build directory; omitted: recipes/{DEFAULT_MODEL}-int8.yaml is built"
    )
    parser.add_argument("--peer", type=Path, help="a folder of onnxruntime-genai's builder; omitted: it is made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    out: Path = arguments.out
    ours = arguments.build or build(RECIPES / f"{DEFAULT_MODEL}-int8.yaml", out)[0]
    model = source_model(ours)
    peer = arguments.peer or make_peer(model, out)
    tokens = None
    if arguments.data:
        tokens = out / "bench" / "tokens.npy"
        np.save(tokens, tokens_of(plain_text(arguments.data, out), model, windows=1, tokens=FED).ids[0].numpy())
    threads = arguments.threads
    rounds = compare(ours, peer, rounds=arguments.rounds, threads=threads, tokens=tokens, out=out)
    title = f"{ours.name} against onnxruntime-genai {GENAI_VERSION} int4, {threads} threads, {len(rounds)} rounds"
    data = {"build": str(ours), "threads": threads, "rounds": [{"llmopt": a, "genai": b} for a, b in rounds]}
    publish_result(out, "against_genai", title, table(rounds), data)


if __name__ == "__main__":
    main()
