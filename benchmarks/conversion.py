"""What converting a large checkpoint takes: megabytes of output a second on one thread, and memory."""

import argparse
import re
import shutil
from pathlib import Path

from llmopt.benchmarks.child import Finished, llmopt_command, run
from llmopt.benchmarks.large_model import largest_layer
from llmopt.benchmarks.random_checkpoint import LLAMA_1B, write_random_llama
from llmopt.benchmarks.report import markdown, publish_result, say

__all__ = ["main", "seconds_of"]

_STEPS = (("gptq", "compressed-tensors"), ("compressed-tensors", "gptq"), ("gptq", "awq"), ("gptq", "gguf"))
"""From the format of a checkpoint that is there already, to another one."""

_RECIPE = """\
version: 1
model: {model}
passes:
  - round_to_nearest: {{scheme: W4A16, group_size: 32, head: none}}
export:
  - checkpoint: {{format: gptq, dtype: float16}}
verify: none
accept: [{{metric: kl, max: 100, windows: 1, tokens: 8}}]
"""


def seconds_of(log: str) -> float:
    """The time of the step that writes, as ``llmopt convert`` says it on standard error.

    Raises:
        ValueError: There is no such line.
    """
    found = re.search(r"^write [\w-]+: ([0-9.]+) s$", log, re.MULTILINE)
    if found is None:
        raise ValueError(f"no step that writes in {log!r}")
    return float(found[1])


def main() -> None:
    """Write a random model, quantize it once, convert it from one format to the next."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=LLAMA_1B["num_hidden_layers"])
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    folder: Path = (arguments.out / "bench" / "conversion").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        rows, data, note = _measured(folder, {**LLAMA_1B, "num_hidden_layers": arguments.layers})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    header = ["from", "to", "output, MB", "seconds of writing", "MB/s", "peak resident memory, GB"]
    title = f"Converting a checkpoint of {arguments.layers} layers on one thread"
    publish_result(arguments.out, "conversion", title, f"{note}\n\n{markdown(header, rows)}", data)


def _measured(folder: Path, config: dict[str, int]) -> tuple[list[list[str]], list[dict[str, object]], str]:
    say("writing a random checkpoint and rounding it to 4 bits")
    plain = write_random_llama(folder / "plain", config)
    recipe = folder / "recipe.yaml"
    recipe.write_text(_RECIPE.format(model=plain), encoding="utf-8")
    _llmopt(folder, "build", str(recipe), "-o", str(folder / "build"))
    shutil.move(folder / "build" / "checkpoint", folder / "gptq")
    rows, data = [], []
    for source, form in _STEPS:
        say(f"{source} to {form}")
        target = folder / form if form != "gptq" else folder / "back"
        finished = _llmopt(folder, "convert", str(folder / source), "--to", form, "-o", str(target))
        size, seconds = (
            sum(path.stat().st_size for path in target.iterdir()),
            seconds_of((folder / "log").read_text("utf-8")),
        )
        data.append({"from": source, "to": form, "bytes": size, "seconds": seconds, "peak": finished.peak_bytes})
        rate, peak = f"{size / 1e6 / seconds:.0f}", f"{finished.peak_bytes / 1e9:.2f}"
        rows.append([source, form, f"{size / 1e6:.0f}", f"{seconds:.1f}", rate, peak])
    layer = 2 * largest_layer(config) / 1e9
    return rows, data, f"Its largest layer, or table, takes {layer:.2f} GB in 16 bits."


def _llmopt(folder: Path, *arguments: str) -> Finished:
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LLMOPT_CACHE": str(folder / "cache")}
    return run([llmopt_command(), *arguments], log=folder / "log", environment=environment)


if __name__ == "__main__":
    main()
