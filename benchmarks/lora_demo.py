"""A LoRA adapter from training to engines, each against PEFT's own model: merged in float, into W8A8 and into int4, and
modular, beside weights in float and in W8A8.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from llmopt.benchmarks.adapters.peft_model import distances, merged_by_peft
from llmopt.benchmarks.adapters.tickets import SYSTEM, Conversation, held_out, trained_on
from llmopt.benchmarks.adapters.training import Training, packed, require_peft, train
from llmopt.benchmarks.adapters.variants import BASE, HELD_OUT, TRAINED_ON, VARIANTS, Variant, write_recipe
from llmopt.benchmarks.child import ChildError
from llmopt.benchmarks.demo import show
from llmopt.benchmarks.plain_checkpoint import write_checkpoint
from llmopt.benchmarks.quantizers.subject import DEFAULT_SPEC
from llmopt.benchmarks.report import markdown, publish_result, say
from llmopt.benchmarks.server import running_server
from llmopt.benchmarks.texts import plain_text
from llmopt.calibration.texts import read_tokens
from llmopt.evaluation.distance import Distance
from llmopt.optimizer.cache import cache_root, publish
from llmopt.optimizer.errors import LlmoptError
from llmopt.optimizer.lora.adapter_file import read_index
from llmopt.optimizer.manifest import Manifest
from llmopt.optimizer.sources import load_model
from llmopt.optimizer.tokenizer_config import chat_template
from llmopt.optimizer.tokens import Tokens
from llmopt.runtime.backends.base import Backend
from llmopt.runtime.backends.onnxruntime import open_backend

__all__ = ["main", "rows", "write_texts"]

WINDOWS, TOKENS = 8, 512
"""Of each text that is measured on."""

_NAME = "tickets"
"""Of the adapter in builds that it was added to."""

_TRAINING_TOKENS = 256
_CONVERSATIONS = {TRAINED_ON: 800, HELD_OUT: 60}

_HEADER = [
    "",
    "largest logit difference",
    "perplexity of PEFT's",
    "of the engine",
    "change",
    "KL, nats/token",
    "same top-1",
]


def write_texts(folder: Path, tokenizer_dir: Path) -> list[Conversation]:
    """Write both texts into ``folder``; one is for training and calibration, the other for measuring.

    Returns:
        The conversations to train on.
    """
    training, measuring = trained_on(_CONVERSATIONS[TRAINED_ON]), held_out(_CONVERSATIONS[HELD_OUT])
    lines = "".join(json.dumps({"messages": each}) + "\n" for each in training)
    (folder / TRAINED_ON).write_text(lines, encoding="utf-8")
    template = chat_template(tokenizer_dir)
    assert template is not None
    text = "".join(template.render(each, add_generation_prompt=False) for each in measuring)
    (folder / HELD_OUT).write_text(text, encoding="utf-8")
    return training


def make_adapter(folder: Path, checkpoint: Path) -> None:
    """Train ``folder/adapter``, unless an earlier run did."""
    adapter, settings = folder / "adapter", Training()
    conversations = write_texts(folder, checkpoint)
    if adapter.is_dir():
        say(f"{adapter} is there already; remove it to train again")
        return
    say(f"\ntraining {adapter}: {settings.steps} steps of {settings.batch * _TRAINING_TOKENS} tokens")
    started, windows = time.perf_counter(), packed(conversations, checkpoint, tokens=_TRAINING_TOKENS)
    with publish(adapter) as partial:
        train(checkpoint, windows, partial, settings, base=DEFAULT_SPEC, progress=_say_loss)
    say(f"trained in {time.perf_counter() - started:.0f} s")


def _say_loss(step: int, loss: float) -> None:
    if step % 10 == 0:
        say(f"  step {step}: loss {loss:.3f}")


def make_build(variant: Variant, folder: Path) -> Path:
    """Build a variant's recipe, as a user would."""
    recipe, directory = write_recipe(variant, folder, model=DEFAULT_SPEC), folder / "builds" / variant.name
    show("build", str(recipe), "-o", str(directory), "--force")
    if variant.modular:
        show("adapter", "add", str(directory), str(folder / "adapter"), "--name", _NAME)
    return directory


def opened(directory: Path, threads: int) -> Backend:
    """The engine of a build, with the adapter chosen that was added to it."""
    engine = Manifest.load(directory).engines[0]
    backend = open_backend(directory, engine, slots=1, capacity=TOKENS, threads=threads)
    if backend.adapters is not None:
        backend.adapters.load(1, read_index(directory)[_NAME])
        backend.adapters.choose([1])
    return backend


def rows(variants: Sequence[Variant], found: Sequence[Distance]) -> list[list[str]]:
    """One line of the table for each variant."""
    lines = []
    for variant, distance in zip(variants, found, strict=True):
        engine, source = distance.perplexities
        figures = [f"{source:.3f}", f"{engine:.3f}", f"{engine / source - 1:+.2%}"]
        shared = [f"{distance.kl / distance.positions:.5f}", f"{distance.agreements / distance.positions:.1%}"]
        lines.append([variant.title, f"{distance.largest:.1e}", *figures, *shared])
    return lines


def missed(variant: Variant, distance: Distance, text: str) -> list[str]:
    """What a variant promises and does not hold on a text, in words."""
    engine, source = distance.perplexities
    said = []
    if variant.max_difference is not None and distance.largest > variant.max_difference:
        said.append(f"{variant.title} on {text}: a logit differs by {distance.largest:.1e}")
    if variant.max_increase is not None and engine / source - 1 > variant.max_increase:
        said.append(f"{variant.title} on {text}: perplexity is {engine / source - 1:+.2%}")
    return said


def compare(folder: Path, checkpoint: Path, texts: Sequence[Tokens], *, threads: int, out: Path) -> None:
    """Print how far each build is from PEFT's merged model on each text.

    Raises:
        ChildError: One is further than it promises.
    """
    network = merged_by_peft(checkpoint, folder / "adapter")
    variants, wrong, data = [BASE, *VARIANTS], [], {}
    backends = [opened(folder / "builds" / each.name, threads) for each in variants]
    for text in texts:
        found = distances(network, backends, text.ids)
        table = markdown(_HEADER, rows(variants, found))
        data[text.name] = dict(zip([each.name for each in variants], rows(variants, found), strict=True))
        title = f"Against PEFT's merged model on {text.name}: {WINDOWS} windows of {TOKENS} tokens"
        publish_result(out, "lora_demo", title, table, data)
        wrong += [said for pair in zip(variants, found, strict=True) for said in missed(*pair, text.name)]
    if wrong:
        raise ChildError("; ".join(wrong))


def ask(directory: Path, letter: str, log: Path, *, model: str | None) -> None:
    """Serve a build and print the answer to ``letter`` of one of its models; None is its own."""
    print(f"\n$ llmopt serve {directory}{'' if model is None else f'   # model: {model}'}", flush=True)
    with running_server(directory, log=log) as server:
        print(server.chat(letter, system=SYSTEM, model=model), flush=True)


def main() -> int:
    """Run every step; 0 when all went well and every build is as close to PEFT's model as it promises."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="another text to measure on, such as WikiText-2's wiki.valid.tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder: Path = arguments.out / "lora-demo"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        require_peft()
        checkpoint = write_checkpoint(load_model(DEFAULT_SPEC, cache=cache_root()), folder / "checkpoint")
        make_adapter(folder, checkpoint)
        directories = {make_build(variant, folder): variant for variant in (BASE, *VARIANTS)}
        paths = [folder / HELD_OUT, *([plain_text(arguments.data, arguments.out)] if arguments.data else [])]
        texts = [read_tokens(each, checkpoint, windows=WINDOWS, tokens=TOKENS, name=each.name) for each in paths]
        letter = held_out(1)[0][1]["content"]
        print(f"\na letter:\n{letter}", flush=True)
        for directory, variant in directories.items():
            ask(directory, letter, folder / "server.log", model=_NAME if variant.modular else None)
        compare(folder, checkpoint, texts, threads=arguments.threads, out=arguments.out)
    except LlmoptError as error:
        hint = f"\nhint: {error.hint}" if error.hint else ""
        print(f"\nerror: {error.message}{hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
