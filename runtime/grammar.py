"""Answers that obey a JSON schema, a regular expression, a grammar or a list of choices, through llguidance."""

import json
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from llmopt.optimizer.errors import InputError, MissingExtraError
from llmopt.runtime.text import Tokenizer

__all__ = ["COMPILE_SECONDS", "Constraint", "ConstraintKind", "Grammar", "GrammarError", "Grammars"]

COMPILE_SECONDS = 5.0
"""Seconds that one constraint may take to be compiled."""

ConstraintKind: TypeAlias = Literal["choice", "grammar", "json_object", "json_schema", "regex"]

# Without a limit, a model that is unsure can write blanks until its tokens are used up.
_BLANKS = r"[ \n\t]{0,20}"

_KEPT = 64
"""Compiled constraints that are kept."""

_COMPILERS = 2
"""Constraints that are compiled at the same time; more wait, and their time runs meanwhile."""


class GrammarError(InputError):
    """A constraint cannot be compiled, or an answer has left it."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer has to be.

    Attributes:
        kind: What ``text`` is. ``grammar`` is llguidance's dialect of Lark, or GBNF.
        text: The schema as JSON, the expression, the grammar, or the choices as a JSON list; empty for ``json_object``.
    """

    kind: ConstraintKind
    text: str = ""


class Grammar:
    """The state of one answer: which tokens may come next.

    Args:
        matcher: Of llguidance; this answer's alone.
        vocab_size: Tokens of a row of logits.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self.words = (vocab_size + 31) // 32

    @property
    def is_complete(self) -> bool:
        """Whether nothing more can follow."""
        return bool(self._matcher.is_stopped())

    def fill(self, mask: npt.NDArray[np.int32]) -> None:
        """Set bit ``t % 32`` of word ``t // 32`` where token t may come next, and clear all others.

        A stop token is among them where the answer may end. Other threads run meanwhile.

        Args:
            mask: int32 ``[words]``.

        Raises:
            GrammarError: The constraint has become too complex to go on with.
        """
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()

    def accept(self, token: int) -> None:
        """Take the token that was chosen.

        Raises:
            GrammarError: It was not allowed.
        """
        self._matcher.consume_token(token)
        self._check()

    def copy(self) -> "Grammar":
        """The same state for another answer."""
        return Grammar(self._matcher.deep_copy(), self._vocab_size)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the answer cannot go on as it has to: {self._matcher.get_error()}")


class Grammars:
    """Compiles constraints for one tokenizer, and keeps the latest; any thread may call it.

    Args:
        tokenizer: Of the build.
        vocab_size: Tokens of a row of logits; the tokenizer may know fewer.
        seconds: That one constraint may take.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, *, seconds: float = COMPILE_SECONDS) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._seconds = seconds
        self._compilers = ThreadPoolExecutor(_COMPILERS, thread_name_prefix="llmopt-grammar")
        self._lock = threading.Lock()
        self._tokens: Any = None
        self._kept: OrderedDict[Constraint, Grammar] = OrderedDict()

    def compile(self, constraint: Constraint) -> Grammar:
        """The state of an answer that has not begun. It takes a while: never call it in the engine's thread.

        Raises:
            GrammarError: The constraint is malformed, asks for something that is not supported, or takes too long.
            MissingExtraError: llguidance is not installed.
        """
        with self._lock:
            if (known := self._kept.get(constraint)) is not None:
                self._kept.move_to_end(constraint)
                return known.copy()
        try:
            compiled = self._compilers.submit(self._compile, constraint).result(self._seconds)
        except FutureTimeoutError as error:
            raise GrammarError(
                f"the {_name(constraint)} takes longer than {self._seconds:g} s to compile", hint="make it simpler"
            ) from error
        with self._lock:
            self._kept[constraint] = compiled
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return compiled.copy()

    def _compile(self, constraint: Constraint) -> Grammar:
        try:
            from llguidance import LLMatcher
        except ModuleNotFoundError as error:
            raise MissingExtraError("llguidance", "serve") from error
        grammar, tokens = _grammar(constraint), self._with_tokens()
        is_wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, tokens)
        if is_wrong or messages:
            raise GrammarError(f"the {_name(constraint)} cannot be used: {' '.join('; '.join(messages).split())}")
        matcher = LLMatcher(tokens, grammar, log_level=0)
        if matcher.is_error():
            raise GrammarError(f"the {_name(constraint)} cannot be used: {matcher.get_error()}")
        return Grammar(matcher, self._vocab_size)

    def _with_tokens(self) -> Any:
        """Llguidance's own view of the tokenizer, made once: it takes a third of a second."""
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokens is None:
                stops = sorted(self._tokenizer.stop_ids)
                self._tokens = LLTokenizer(str(self._tokenizer.path), n_vocab=self._vocab_size, eos_token=stops)
            return self._tokens


def _name(constraint: Constraint) -> str:
    names = {
        "choice": "list of choices",
        "grammar": "grammar",
        "json_object": "JSON object",
        "json_schema": "JSON schema",
        "regex": "regular expression",
    }
    return names[constraint.kind]


def _grammar(constraint: Constraint) -> str:
    """In llguidance's own form.

    Raises:
        GrammarError: It is malformed.
    """
    from llguidance import LLMatcher, grammar_from

    try:
        if constraint.kind in ("json_object", "json_schema"):
            schema = constraint.text if constraint.kind == "json_schema" else '{"type": "object"}'
            return str(LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _BLANKS}))
        if constraint.kind == "choice":
            choices = json.loads(constraint.text)
            if not choices:
                raise ValueError("it is empty")  # noqa: TRY301 - told like every other mistake in it
            return str(LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, choices))))
        if constraint.kind == "regex":
            return str(LLMatcher.grammar_from_regex(constraint.text))
        return str(grammar_from("grammar", constraint.text))
    except Exception as error:  # the converters raise whatever they like
        raise GrammarError(f"the {_name(constraint)} cannot be read: {error}") from error
