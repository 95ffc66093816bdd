"""Builds a random model of billions of parameters and shows the memory that each step of the build had."""

import argparse
import json
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from random import Random
from typing import Any

from llmopt.benchmarks.builds import build
from llmopt.benchmarks.random_checkpoint import LLAMA_1B, LLAMA_3B, parameter_shapes, write_random_llama
from llmopt.benchmarks.report import markdown, publish_result, say
from llmopt.optimizer.build_record import read_record

__all__ = ["build_random", "largest_layer", "main"]

_PASSES: Mapping[str, list[Any]] = {
    "int8": [{"round_to_nearest": {"scheme": "W8A8"}}],
    "gptq-int4": [{"gptq": {"scheme": "W4A16", "group_size": 32}}],
    "float": [],
}
_SIZES = {"3b": LLAMA_3B, "1b": LLAMA_1B}
_CAPACITY = 4096


def main() -> None:
    """Write the checkpoint, build it, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("formats", nargs="*", choices=[[], *_PASSES], help="int8, gptq-int4, float; omitted: int8")
    parser.add_argument("--size", choices=_SIZES, default="3b")
    parser.add_argument("--layers", type=int, help="other than the model's")
    parser.add_argument("--untied", action="store_true", help="give the head a table of its own")
    parser.add_argument("--max-ram-gb", type=float, default=6, help="of the recipes")
    parser.add_argument(
        "--directory", type=Path, help="for 16 GB of files, deleted afterwards; omitted: OUT/bench/large"
    )
    parser.add_argument("--keep", action="store_true", help="leave the files for another run")
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    directory: Path = (arguments.directory or arguments.out / "bench" / "large").resolve()
    config = {**_SIZES[arguments.size], "tie_word_embeddings": not arguments.untied}
    config["num_hidden_layers"] = arguments.layers or config["num_hidden_layers"]
    name = f"llama-{arguments.size}-{config['num_hidden_layers']}{'-untied' * arguments.untied}"
    say(f"writing the checkpoint below {directory}")
    checkpoint = write_random_llama(directory / name, config)
    layer = largest_layer(config)
    rows, data = [], []
    try:
        for name in arguments.formats or ["int8"]:
            say(f"building {name}")
            record, engine = build_random(checkpoint, name, directory, max_ram_gb=arguments.max_ram_gb)
            rows += _rows(name, record)
            data.append({"format": name, "engine_bytes": engine, **record})
    finally:
        if not arguments.keep:
            shutil.rmtree(directory)
    table = markdown(["build", "step", "seconds", "peak resident memory, GB"], rows)
    title = f"Memory of a build of {_parameters(config) / 1e9:.2f} billion parameters"
    note = (
        f"The largest layer has {layer:,} parameters: {2 * layer / 1e9:.2f} GB in the checkpoint (bf16), "
        f"{layer / 1e9:.2f} GB in an int8 engine, {4 * layer / 1e9:.2f} GB in a float one."
    )
    publish_result(arguments.out, "large_model", title, f"{note}\n\n{table}", {"largest_layer": layer, "builds": data})


def largest_layer(config: Mapping[str, Any]) -> int:
    """Parameters of the largest part of the model; the embedding's table and the head's count as layers."""
    return max(sum(map(prod, shapes.values())) for shapes in parameter_shapes(config).values())


def _parameters(config: Mapping[str, Any]) -> int:
    return sum(prod(shape) for shapes in parameter_shapes(config).values() for shape in shapes.values())


def build_random(
    checkpoint: Path, name: str, directory: Path, *, max_ram_gb: float | None
) -> tuple[dict[str, Any], int]:
    """The build's record, with nothing in the cache, and the size of its engine."""
    cache = directory / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    recipe = directory / f"{checkpoint.name}-{name}.yaml"
    settings = {
        "version": 1,
        "model": str(checkpoint),
        "calibration": {"source": _text(directory).name, "samples": 8, "tokens": 512, "packing": "concat"},
        "passes": _PASSES[name],
        "export": [{"onnx": {"target": "cpu", "capacity": _CAPACITY}}],
        "resources": {"max_ram_gb": max_ram_gb},
    }
    recipe.write_text(json.dumps(settings), encoding="utf-8")
    built, finished = build(recipe, directory, environment={"LLMOPT_CACHE": str(cache)})
    say(finished.output)
    record = read_record(built)
    assert record is not None
    return record, sum(path.stat().st_size for path in (built / "engine").iterdir())


def _text(directory: Path) -> Path:
    """A text for calibration: its tokens are as random as the model."""
    path = directory / "calibration.txt"
    letters = Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=1 << 16)
    path.write_text("".join(letters), encoding="utf-8")
    return path


def _rows(name: str, record: Mapping[str, Any]) -> list[list[str]]:
    seconds, peaks = record["seconds"], record["peak_memory_bytes_by_step"]
    rows = [[name, step, f"{seconds[step]:.0f}", f"{peak / 1e9:.2f}"] for step, peak in peaks.items()]
    return [*rows, [name, "all", f"{seconds['total']:.0f}", f"{record['peak_memory_bytes'] / 1e9:.2f}"]]


if __name__ == "__main__":
    main()
