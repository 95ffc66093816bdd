"""Keeps answers to what a client asked for: of every next token, whether the grammar allows it."""

import importlib.util
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from llmopt.optimizer.errors import MissingExtraError, UnsupportedError
from llmopt.runtime.structured.constraint import Constraint, GrammarError
from llmopt.runtime.structured.trial import Trial, compiled, open_tokenizer
from llmopt.runtime.text import Tokenizer

__all__ = ["Constraint", "Grammar", "GrammarError", "Grammars", "Mask"]

Mask: TypeAlias = npt.NDArray[np.int32]

_KEPT = 32  # compiled grammars; a large one takes tens of megabytes


class Grammars:
    """Compiles the constraints of one build, and keeps those used last. Any thread may use it.

    Args:
        tokenizer: Of the build.
        vocab_size: Width of the logits; the tokenizer's vocabulary may be smaller or larger.
        seconds: What compiling a grammar may take.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, *, seconds: float = 5.0) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._seconds = seconds
        self._kept: OrderedDict[Constraint, Grammar] = OrderedDict()
        self._keeping = threading.Lock()
        self._compiling = threading.Lock()
        self._compiler: _Compiler | None = None

    def compile(self, constraint: Constraint) -> "Grammar":
        """The grammar at its beginning. Takes up to ``seconds``, and longer the first time.

        Raises:
            GrammarError: The constraint cannot be compiled, or not within the time.
            MissingExtraError: llguidance is not installed.
            UnsupportedError: The build's tokenizer cannot be used.
        """
        found = self._find(constraint)
        if found is None:
            with self._compiling:
                found = self._find(constraint) or self._compile(constraint)
        return found.copy()

    def close(self) -> None:
        """End the process that tries grammars."""
        with self._compiling:
            if self._compiler is not None:
                self._compiler.trial.close()

    def _find(self, constraint: Constraint) -> "Grammar | None":
        with self._keeping:
            found = self._kept.get(constraint)
            if found is not None:
                self._kept.move_to_end(constraint)
            return found

    def _compile(self, constraint: Constraint) -> "Grammar":
        if self._compiler is None:
            self._compiler = _open(self._tokenizer, self._vocab_size, self._seconds)
        compiler = self._compiler
        source = compiler.trial.run(constraint)
        grammar = Grammar(compiled(compiler.tokenizer, source), compiler.layout)
        with self._keeping:
            self._kept[constraint] = grammar
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return grammar


class Grammar:
    """How far one request has come in its grammar. One thread at a time may use it.

    Attributes:
        words: Length of a mask: one bit for each token, in words of 32.
    """

    def __init__(self, matcher: Any, layout: "_Layout") -> None:
        self.words = layout.words
        self._matcher = matcher
        self._layout = layout
        self._own = np.zeros((layout.known + 31) // 32, np.int32)
        self._address = self._own.ctypes.data

    @property
    def is_complete(self) -> bool:
        """Whether nothing more can follow: the text is whole, or a stop token was taken."""
        return bool(self._matcher.is_stopped())

    def copy(self) -> "Grammar":
        """Another request's, as far as this one has come."""
        return Grammar(self._matcher.deep_copy(), self._layout)

    def fill(self, mask: Mask) -> None:
        """Write which tokens may come next; other threads run meanwhile.

        Args:
            mask: int32 ``[words]``. Bit t % 32 of word t // 32 is set where token t may come next; that of every stop
                token where the text may end.

        Raises:
            GrammarError: Telling takes too much.
        """
        layout, own = self._layout, self._own
        self._matcher.unsafe_compute_mask_ptr(self._address, own.nbytes)
        self._check()
        shared = min(layout.words, len(own))
        mask[:shared] = own[:shared]
        mask[shared:] = 0
        mask &= layout.ordinary
        if own[layout.end // 32] >> (layout.end % 32) & 1:
            mask |= layout.stops

    def accept(self, token: int) -> None:
        """Go on behind the token that was chosen.

        Raises:
            GrammarError: It was not allowed, or following it takes too much.
        """
        if not self._matcher.consume_token(self._read(token)):
            self._check()

    def accepts(self, tokens: Sequence[int]) -> int:
        """How many of ``tokens``, one behind the other, would be accepted; nothing changes.

        These may be more than ``fill`` tells: of a text that can only go on in one way, that gives the one token that
        the tokenizer would cut it into.
        """
        # A token that llguidance does not know would end the matcher.
        known = list(takewhile(lambda token: token < self._layout.known, map(self._read, tokens)))
        if self.is_complete:
            return int(known[:1] == [self._layout.end])
        return int(self._matcher.validate_tokens(known))

    def _read(self, token: int) -> int:
        """The token as llguidance, which knows one stop token, calls it."""
        return self._layout.end if int(token) in self._layout.stop_ids else int(token)

    def _check(self) -> None:
        # A matcher that failed tells the end of the text, as if it were whole.
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed: {_first_line(self._matcher.get_error())}")


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where tokens are in masks.

    Attributes:
        words: Of a mask.
        known: Tokens that llguidance knows: those of the tokenizer.
        end: The stop token that llguidance knows.
        stop_ids: All of them.
        stops: Mask of the stop tokens.
        ordinary: Mask of all others.
    """

    words: int
    known: int
    end: int
    stop_ids: frozenset[int]
    stops: Mask
    ordinary: Mask


@dataclass(frozen=True, slots=True)
class _Compiler:
    tokenizer: Any
    trial: Trial
    layout: _Layout


def _open(tokenizer: Tokenizer, vocab_size: int, seconds: float) -> _Compiler:
    if importlib.util.find_spec("llguidance") is None:
        raise MissingExtraError("llguidance", "serve")
    stop_ids = frozenset(token for token in tokenizer.stop_ids if token < vocab_size)
    if not stop_ids:
        raise UnsupportedError("this build has no token that ends an answer, which grammars need")
    end = min(stop_ids)
    theirs = open_tokenizer(tokenizer.serialized(), end)
    stops = _mask(vocab_size, stop_ids)
    layout = _Layout(
        words=len(stops),
        known=theirs.vocab_size,
        end=end,
        stop_ids=stop_ids,
        stops=stops,
        ordinary=_mask(vocab_size, range(vocab_size)) & ~stops,
    )
    return _Compiler(theirs, Trial(tokenizer, end, seconds=seconds), layout)


def _mask(vocab_size: int, tokens: Sequence[int] | frozenset[int]) -> Mask:
    """The mask of ``tokens``, int32 ``[words]``."""
    bits = np.zeros((vocab_size + 31) // 32 * 32, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
