"""Documents packed into windows of equal length, which is how passes take them."""

from collections.abc import Iterable

import torch
from torch import Tensor

from llmopt.optimizer.errors import InputError

__all__ = ["concatenated", "padded"]


def concatenated(
    documents: Iterable[list[int]], *, windows: int, tokens: int, end: int | None, name: str, generator: torch.Generator
) -> Tensor:
    """Documents joined one behind the other and cut into full windows.

    Args:
        documents: Token ids, in the order they are joined; no more are asked for than needed.
        windows: How many windows are drawn among those that the documents make.
        tokens: Of each window.
        end: The end-of-text token, put behind each document that does not end with it; None: nothing is.
        name: Of the source, for messages.
        generator: Draws the windows.

    Returns:
        int64 ``[windows, tokens]``; no token of the documents is in two windows.

    Raises:
        InputError: There is too little text; the hint says how many windows would fit.
    """
    pieces: list[Tensor] = []
    found = 0
    for ids in documents:
        closed = ids if end is None or not ids or ids[-1] == end else [*ids, end]
        pieces.append(torch.tensor(closed, dtype=torch.int32))
        found += len(closed)
        if found >= windows * tokens:
            break
    if found < windows * tokens:
        raise InputError(
            f"{name} has {found} tokens, {windows} samples of {tokens} tokens need {windows * tokens}",
            hint=_fit(found // tokens, found),
        )
    whole = torch.cat(pieces)[: found // tokens * tokens].view(-1, tokens)
    return whole[torch.randperm(len(whole), generator=generator)[:windows]].long()


def padded(
    documents: Iterable[list[int]], *, windows: int, tokens: int, padding: int, name: str
) -> tuple[Tensor, Tensor]:
    """One document a window, cut to its length or padded on the right.

    Args:
        documents: Token ids; empty documents are passed over, and no more are asked for than needed.
        windows: How many.
        tokens: Of each window.
        padding: The token that fills a window; any will do, because nobody looks at it.
        name: Of the source, for messages.

    Returns:
        int64 ``[windows, tokens]``, and the tokens of text in each, int64 ``[windows]``.

    Raises:
        InputError: There are too few documents; the hint says how many windows would fit.
    """
    ids = torch.full((windows, tokens), padding, dtype=torch.int64)
    lengths = torch.zeros(windows, dtype=torch.int64)
    filled = 0
    for document in documents:
        if document:
            lengths[filled] = min(len(document), tokens)
            ids[filled, : lengths[filled]] = torch.tensor(document[:tokens])
            filled += 1
        if filled == windows:
            return ids, lengths
    raise InputError(
        f"{name} has {filled} documents with text, {windows} samples need one each", hint=_fit(filled, filled)
    )


def _fit(windows: int, found: int) -> str:
    if windows:
        return f"samples: {windows} would fit; or give more text"
    return "give more text, or set fewer tokens" if found else "it has no text"
