"""From a recipe's gates to the texts they need, and from measurements to a verdict."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmopt.calibration.lines import read_lines
from llmopt.calibration.sampling import Sampling, sample_tokens
from llmopt.calibration.texts import read_tokens
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.gates import COSINES, Gate
from llmopt.optimizer.manifest import GateResult, Measurement, Verdict
from llmopt.optimizer.model import Model
from llmopt.optimizer.tokens import SAMPLED, Tokens

__all__ = ["gates_of", "judge", "texts_for"]


def texts_for(
    gates: Sequence[Gate],
    model: Model,
    *,
    base: Path | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Tokens]:
    """Every text the gates name, once each.

    Args:
        gates: The recipe's ``accept:``.
        model: The source model, which writes the text of gates without data.
        base: What relative paths are relative to: the recipe's folder; None means the working directory.
        seed: The recipe's.
        threads: PyTorch threads for sampling.
        progress: Called with (finished, total) steps of sampling.

    Raises:
        InputError: A text is missing, too short, or not text.
    """
    texts: dict[tuple[str, int, int], Tokens] = {}
    for gate in gates:
        key = (_text_name(gate), gate.windows, gate.tokens)
        if key in texts:
            continue
        if gate.data is None:
            wanted = Sampling("evaluation", gate.windows, gate.tokens, seed=seed)
            texts[key] = sample_tokens(model, wanted, threads=threads, progress=progress)
        elif gate.metric in COSINES:
            path = (base or Path()) / gate.data
            texts[key] = read_lines(
                path, model.source.tokenizer_dir, lines=gate.windows, tokens=gate.tokens, name=key[0]
            )
        else:
            path = (base or Path()) / gate.data
            texts[key] = read_tokens(
                path, model.source.tokenizer_dir, windows=gate.windows, tokens=gate.tokens, name=key[0]
            )
    return list(texts.values())


def judge(gates: Sequence[Gate], measurements: Sequence[Measurement]) -> Verdict:
    """Hold each gate against what was measured on its text.

    Where several measurements fit a gate, the worst one counts.

    Raises:
        InputError: Nothing was measured for a gate.
    """
    results = [_judge_one(gate, measurements) for gate in gates]
    if not results:
        return Verdict(status="unjudged")
    return Verdict(status="accepted" if all(result.passed for result in results) else "rejected", gates=results)


def _judge_one(gate: Gate, measurements: Sequence[Measurement]) -> GateResult:
    counted = gate.windows * (gate.tokens - 1 if gate.metric == "perplexity" else gate.tokens)
    of_text = [found for found in measurements if (found.metric, found.data) == (gate.metric, _text_name(gate))]
    # How many tokens some lines have is known only behind the tokenizer.
    fitting = [found for found in of_text if gate.metric in COSINES or found.tokens == counted]
    if not fitting:
        raise InputError(f"{gate.metric} on {_text_name(gate)} was not measured, but a gate asks for it")
    results = [GateResult(gate=gate.describe(), value=found.value, passed=_passes(gate, found)) for found in fitting]
    return next((result for result in results if not result.passed), results[0])


def _passes(gate: Gate, found: Measurement) -> bool:
    """Whether the value is within the limit. A value that is not a number is within none."""
    if gate.min is not None:
        return found.value >= gate.min
    if gate.max is not None:
        return found.value <= gate.max
    assert gate.max_increase is not None
    assert found.source is not None
    return found.value <= found.source * (1 + gate.max_increase)


def _text_name(gate: Gate) -> str:
    return SAMPLED if gate.data is None else str(gate.data)


def gates_of(recipe: Mapping[str, Any]) -> list[Gate]:
    """The gates of a resolved recipe, as a manifest holds it."""
    return [Gate.model_validate(entry) for entry in recipe.get("accept", ())]
