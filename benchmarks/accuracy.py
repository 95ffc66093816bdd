"""Measures what each recipe loses against its source model: perplexity, KL divergence and top-1 agreement."""

import argparse
from functools import partial
from pathlib import Path

from llmopt.benchmarks.builds import DEFAULT_MODEL, RECIPES, build, source_model
from llmopt.benchmarks.report import markdown, publish_result, say
from llmopt.benchmarks.texts import plain_text, tokens_of
from llmopt.evaluation.measure import measure
from llmopt.optimizer.manifest import Manifest, Measurement
from llmopt.runtime.backends.onnxruntime import open_backend

__all__ = ["main"]


def row(name: str, found: dict[str, Measurement]) -> list[str]:
    """One line of the table; on sampled text there is no perplexity."""
    text = found.get("perplexity")
    if text is None or text.source is None:
        perplexity = ["-", "-", "-"]
    else:
        perplexity = [f"{text.source:.3f}", f"{text.value:.3f}", f"{text.value / text.source - 1:+.2%}"]
    return [name, *perplexity, f"{found['kl'].value:.4f}", f"{found['top1'].value:.1%}"]


def main() -> None:
    """Build the recipes, measure each engine on the same tokens, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipes", nargs="*", type=Path, help=f"omitted: recipes/{DEFAULT_MODEL}-*.yaml")
    parser.add_argument("--data", type=Path, help="a text file; omitted: text sampled from the model")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024, help="per window")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    out: Path = arguments.out
    text = plain_text(arguments.data, out) if arguments.data else None
    rows, data = [], []
    for recipe in arguments.recipes or sorted(RECIPES.glob(f"{DEFAULT_MODEL}-*.yaml")):
        say(f"accuracy of {recipe.stem}")
        directory, _ = build(recipe, out)
        model = source_model(directory)
        tokens = tokens_of(text, model, windows=arguments.windows, tokens=arguments.tokens)
        engine = Manifest.load(directory).engines[0]
        opener = partial(open_backend, directory, engine, slots=1, capacity=arguments.tokens, threads=arguments.threads)
        measured = measure(model, opener, [tokens], threads=arguments.threads)
        rows.append(row(recipe.stem, {each.metric: each for each in measured}))
        data.append({"recipe": recipe.name, "measurements": [each.model_dump(mode="json") for each in measured]})
    header = ["recipe", "perplexity of the source", "of the engine", "change", "KL, nats/token", "same top-1"]
    where = arguments.data.name if arguments.data else "text sampled from the model"
    title = f"Accuracy on {where}: {arguments.windows} windows of {arguments.tokens} tokens"
    publish_result(out, "accuracy", title, markdown(header, rows), data)


if __name__ == "__main__":
    main()
