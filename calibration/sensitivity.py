"""How much a model's predictions change when one part of it is rounded and everything else stays in float."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmopt.calibration.divergence import kl_divergence
from llmopt.calibration.reference import Reference
from llmopt.optimizer.cache import digest_of, locked
from llmopt.optimizer.errors import PassError
from llmopt.optimizer.model import Model, Weight
from llmopt.optimizer.scheme import Scheme
from llmopt.optimizer.tokens import Tokens
from llmopt.optimizer.weight_rounding import round_weight

__all__ = ["Part", "sensitivities", "shortened"]

_WINDOW = 256
"""Tokens of a window at most: many short texts say more than a few long ones."""
_BATCH_TOKENS = 2048
_ROWS = 128
"""Positions whose logits are in memory at a time."""


@dataclass(frozen=True, slots=True)
class Part:
    """Linears of one decoder layer that get one scheme.

    Attributes:
        layer: Its number.
        modules: Their names.
        schemes: Those that are tried; None leaves them in float, which costs nothing.
    """

    layer: int
    modules: tuple[str, ...]
    schemes: tuple[Scheme | None, ...]


def shortened(tokens: Tokens, count: int) -> tuple[Tensor, Tensor]:
    """The first windows of a text, cut to 256 tokens.

    Returns:
        Ids int64 ``[n, t]`` of about ``count`` tokens, and bool ``[n, t]``, false where there is padding.
    """
    length = min(_WINDOW, tokens.ids.shape[1])
    windows = min(len(tokens.ids), max(1, round(count / length)))
    return tokens.ids[:windows, :length], tokens.mask[:windows, :length]


def sensitivities(
    model: Model,
    parts: Sequence[Part],
    text: tuple[Tensor, Tensor],
    *,
    maxima: Mapping[str, float] | None = None,
    threads: int | None = None,
    directory: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[float]]:
    """The mean KL divergence of the predictions from the float model's, for every part in each of its schemes.

    What enters a layer is kept, so only the rounded layer, those behind it and the head are run. It is computed in
    float32: what bfloat16 rounds on the way costs SmolLM2 0.0017 nats, more than one linear in 4 bits does.

    Args:
        model: The float model. Held in memory: a layer's weights, and what ``text`` is in front of a layer, once for
            each part and scheme of one layer.
        parts: In the order of their layers.
        text: As ``shortened`` returns it.
        maxima: The largest magnitude that enters each linear, which its scale covers under schemes with static ones.
            Those of more text than ``text``, so that the scales are the ones that are stored in the end.
        threads: PyTorch threads; None keeps the process's number.
        directory: Where what has been measured is found again, in a file per layer.
        progress: Called with (finished, total) layers.

    Returns:
        Nats per token, for each part and scheme in order. Rounding may leave a little below 0, which is 0 then.

    Raises:
        PassError: The model's predictions are not finite.
    """
    ids, mask = text
    roundings = [[_rounding(part, scheme, maxima or {}) for scheme in part.schemes] for part in parts]
    found = [_kept(directory, layer) for layer in range(model.num_layers)]
    wanted: list[dict[str, _Rounding]] = [{} for _ in found]
    for part, tried in zip(parts, roundings, strict=True):
        wanted[part.layer] |= {rounding.key: rounding for rounding in tried if rounding is not None}
    if any(each.keys() - known.keys() for each, known in zip(wanted, found, strict=True)):
        run = _Run(model, ids, mask, threads)
        for layer, each in enumerate(wanted):
            missing = {key: change for key, change in each.items() if key not in found[layer]}
            found[layer] |= run.changes(missing)
            _keep(directory, layer, found[layer])
            run.advance()
            progress(layer + 1, model.num_layers)
    return [
        [0.0 if rounding is None else found[part.layer][rounding.key] for rounding in tried]
        for part, tried in zip(parts, roundings, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Rounding:
    """What is done to one part.

    Attributes:
        scheme: What it is rounded to.
        largest: Its linears -> the magnitude that the scale of their inputs covers; None where none is stored.
    """

    scheme: Scheme
    largest: Mapping[str, float | None]

    @property
    def key(self) -> str:
        """Its name among what is kept."""
        scheme = self.scheme.model_dump(mode="json")
        return digest_of([list(self.largest), scheme, list(self.largest.values())])


def _rounding(part: Part, scheme: Scheme | None, maxima: Mapping[str, float]) -> _Rounding | None:
    if scheme is None:
        return None
    return _Rounding(scheme, {name: maxima[name] if scheme.needs_input_scale else None for name in part.modules})


class _Run:
    """A text in front of one layer after the other, and behind the last."""

    def __init__(self, model: Model, ids: Tensor, mask: Tensor, threads: int | None) -> None:
        self._model = model
        self._reference = Reference(model, threads=threads)
        self._mask = mask
        self._layer = 0
        batch = max(1, _BATCH_TOKENS // ids.shape[1])
        self._entering = [self._reference.embed(each) for each in torch.split(ids, batch)]
        self._left = self._through(range(model.num_layers), [self._entering])[0]

    def advance(self) -> None:
        """Go on to the next layer."""
        self._entering = self._through([self._layer], [self._entering])[0]
        self._layer += 1

    def changes(self, roundings: Mapping[str, _Rounding]) -> dict[str, float]:
        """The divergence that each rounding of the layer makes, by the same names."""
        if not roundings:
            return {}
        texts = [self._rounded(rounding) for rounding in roundings.values()]
        texts = self._through(range(self._layer + 1, self._model.num_layers), texts)
        return dict(zip(roundings, self._divergences(texts), strict=True))

    def _rounded(self, rounding: _Rounding) -> list[Tensor]:
        """What leaves the layer under one rounding."""
        exact: dict[str, Weight] = {}
        rounded: dict[str, Weight] = {}
        for module, largest in rounding.largest.items():
            name = self._model.weight_of(module)
            exact[name] = self._model.weights[name]
            inputs = None if largest is None else torch.tensor(largest)
            rounded[name], _ = round_weight(name, exact[name], rounding.scheme, inputs)
        self._reference.update(rounded)
        left = self._through([self._layer], [self._entering])[0]
        self._reference.update(exact)
        return left

    def _through(self, layers: Sequence[int] | range, texts: list[list[Tensor]]) -> list[list[Tensor]]:
        """``texts`` behind some layers, each of which is loaded once."""
        for layer in layers:
            texts = [[self._reference.layer(layer, batch) for batch in text] for text in texts]
        return texts

    def _divergences(self, texts: list[list[Tensor]]) -> list[float]:
        """The mean KL divergence of each text's predictions from those of the float model."""
        rows = [torch.cat(text)[self._mask] for text in (self._left, *texts)]
        sums = [0.0] * len(texts)
        for first in range(0, len(rows[0]), _ROWS):
            source, *others = (self._reference.head(each[first : first + _ROWS]).float() for each in rows)
            for number, logits in enumerate(others):
                sums[number] += float(kl_divergence(source, logits).sum())
        means = [each / len(rows[0]) for each in sums]
        if not all(map(math.isfinite, means)):
            raise PassError(
                f"the predictions are not finite when linears of layer {self._layer} are rounded",
                hint="the model overflows on the calibration text, or its weights are damaged",
            )
        return [max(0.0, mean) for mean in means]


def _kept(directory: Path | None, layer: int) -> dict[str, float]:
    """What was measured of a layer before."""
    if directory is None or not (path := directory / f"layer-{layer:05d}.json").is_file():
        return {}
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _keep(directory: Path | None, layer: int, found: Mapping[str, float]) -> None:
    """Write it down, with what another build has measured meanwhile: a file is whole or not there."""
    if directory is None:
        return
    path, partial = directory / f"layer-{layer:05d}.json", directory / f".layer-{layer:05d}.partial"
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        partial.write_text(json.dumps(_kept(directory, layer) | dict(found), sort_keys=True), encoding="utf-8")
        partial.replace(path)
