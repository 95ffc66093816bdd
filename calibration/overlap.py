"""Whether a build would be judged on text it was made with."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmopt.optimizer.errors import InputError
from llmopt.optimizer.tokens import Tokens

__all__ = ["check_disjoint"]

_RUN = 32
"""Tokens in a row that two texts must not share: longer than names and common phrases."""

_DISTINCT = 12
"""Different tokens in a run that counts; a run with fewer is a rule, a table's edge or white space."""


_OFFSET = 2**31
"""Without it small ids would use the low powers' bits only."""

_POWERS = torch.tensor([pow(6364136223846793005, power, 2**64) - 2**63 for power in range(_RUN)])


def check_disjoint(calibration: Tokens, evaluation: Sequence[Tokens], *, decode: Callable[[list[int]], str]) -> None:
    """Refuse evaluation on calibration text.

    Two sampled texts are apart by their seeds; what a model has learned by heart it may write in both. So runs of
    tokens are compared between files only.

    Args:
        calibration: What passes look at.
        evaluation: What the build is measured on.
        decode: Shows tokens, for the message.

    Raises:
        InputError: Both are the same file, or share a run of tokens; naming both.
    """
    if calibration.is_sampled:
        return
    known = _runs(calibration)[0]
    for text in evaluation:
        if text.is_sampled:
            continue
        if text.digest == calibration.digest:
            raise _shared(calibration, text, "are the same file")
        hashes, places = _runs(text)
        if len(found := places[torch.isin(hashes, known)]):
            window, start = divmod(int(found[0]), text.ids.shape[1])
            excerpt = " ".join(decode(text.ids[window, start : start + _RUN].tolist()).split())
            raise _shared(calibration, text, f"share {len(found)} runs of {_RUN} tokens, such as {excerpt!r}")


def _runs(text: Tokens) -> tuple[Tensor, Tensor]:
    """A hash of every run of ``_RUN`` tokens of text in one window, and where the run starts, both int64 ``[runs]``."""
    length = text.ids.shape[1]
    if length < _RUN:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    found = [_hashed(ids.unfold(0, _RUN, 1)) for ids in text.ids]
    counts = text.mask.sum(dim=1).tolist()
    hashes, places = [], []
    for window, (values, is_various) in enumerate(found):
        kept = is_various & (torch.arange(len(values)) <= counts[window] - _RUN)
        hashes.append(values[kept])
        places.append(window * length + kept.nonzero()[:, 0])
    return torch.cat(hashes), torch.cat(places)


def _hashed(runs: Tensor) -> tuple[Tensor, Tensor]:
    """For runs int64 ``[n, tokens]``: a hash of each, int64 ``[n]``, and whether it has enough different tokens.

    The hash is a polynomial modulo 2**64: two different runs have the same one with a probability of about 1e-19.
    """
    various = (runs.sort(dim=1).values.diff(dim=1) != 0).sum(dim=1) >= _DISTINCT - 1
    return ((runs + _OFFSET) * _POWERS).sum(dim=1), various


def _shared(calibration: Tokens, text: Tokens, what: str) -> InputError:
    return InputError(
        f"the calibration text {calibration.name} and the evaluation text {text.name} {what}",
        hint="a build that is judged on text it was made with looks better than it is; give it other text",
    )
