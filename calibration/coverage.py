"""What a pass's calibration text reached: tokens per module and per expert, the lengths of its texts, and the gaps."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from llmopt.optimizer.contracts import PassContext
from llmopt.optimizer.decoder import Decoder, Experts
from llmopt.optimizer.errors import PassError

if TYPE_CHECKING:
    from llmopt.optimizer.tokens import Tokens

__all__ = ["Coverage", "coverage_words"]

_NAMED = 5
"""How many names a message lists; the record has all."""


class Coverage:
    """Counts the tokens that reach each linear of a decoder while a pass calibrates.

    Args:
        decoder: Of the model.
        text: What the pass looks at.
        expected: The linears that should be reached; None: all of the layers. Others may be counted too.
    """

    def __init__(self, decoder: Decoder, text: "Tokens", expected: Collection[str] | None = None) -> None:
        self._layers = decoder.layers
        self._expected = expected
        self._expert_linears = decoder.expert_linears
        self._text = text
        self._tokens: Counter[str] = Counter()

    def add(self, module: str, tokens: int) -> None:
        """Count ``tokens`` more tokens of text, padding left out, that were given to ``module``."""
        self._tokens[module] += tokens

    @property
    def unreached(self) -> list[str]:
        """The linears outside of experts that no token reached, in data order."""
        linears = [name for layer in self._layers for name in layer.linears]
        wanted = (name for name in linears if self._expected is None or name in self._expected)
        return [name for name in wanted if name not in self._expert_linears and not self._tokens[name]]

    @property
    def experts(self) -> dict[str, list[int]]:
        """Tokens of each expert, by the layer that has them."""
        return {
            layer.name: [self._tokens[gate] for gate, _, _ in layer.mlp.experts]
            for layer in self._layers
            if isinstance(layer.mlp, Experts) and any(name in self._tokens for name in layer.mlp.linears)
        }

    def details(self) -> dict[str, Any]:
        """The whole, as plain data for a pass record; ``coverage_words`` reads it.

        Modules are listed by how many tokens they got, because nearly all got the same.
        """
        by_count: dict[str, list[str]] = {}
        for name, count in self._tokens.items():
            if name not in self._expert_linears:
                by_count.setdefault(str(count), []).append(name)
        most = max(by_count, key=lambda count: len(by_count[count]), default="0")
        return {
            "tokens": self._text.count,
            "lengths": _histogram(self._text),
            "modules": {"count": len(by_count.get(most, ())), "tokens": int(most)},
            "others": {name: int(count) for count, names in by_count.items() if count != most for name in names},
            "unreached": self.unreached,
            "experts": self.experts,
        }

    def record(self, context: PassContext) -> None:
        """Put the report into the pass's record, with a note about experts that no token reached.

        Raises:
            PassError: A linear that every token should pass through was never reached, so that nothing is known of it.
        """
        if unreached := self.unreached:
            raise PassError(
                f"the calibration text never reached {_listed(unreached)}",
                hint="they take no part in the model's computation; keep them in floating point with overrides",
            )
        context.detail("coverage", self.details())
        never = _unreached_experts(self.experts)
        if never:
            total = sum(len(counts) for counts in self.experts.values())
            context.note(
                f"{len(never)} of {total} experts were reached by no token of the calibration text: {_listed(never)}"
            )


def coverage_words(details: Mapping[str, Any]) -> list[str]:
    """A report of ``Coverage.details`` for people, a sentence each."""
    modules, others, experts = details["modules"], details["others"], details["experts"]
    words = [f"{modules['count']} modules saw {modules['tokens']:,} tokens of text"]
    if others:
        least = min(others, key=lambda name: others[name])
        words.append(f"{len(others)} modules saw other counts, the fewest {least} with {others[least]:,}")
    if counts := [count for layer in experts.values() for count in layer]:
        never = len(_unreached_experts(experts))
        words.append(f"{len(counts)} experts saw {min(counts):,} to {max(counts):,} tokens, {never} of them none")
    if len(details["lengths"]) > 1:
        words.append("texts by tokens: " + ", ".join(f"{size}: {count}" for size, count in details["lengths"].items()))
    return words


def _histogram(text: "Tokens") -> dict[str, int]:
    """How many windows have how many tokens of text, in bins that double: ``{"65-128": 3, "129-256": 20}``."""
    counts = Counter(max(length - 1, 0).bit_length() for length in text.mask.sum(dim=1).tolist())
    return {f"{2 ** (power - 1) + 1 if power else 0}-{2**power}": counts[power] for power in sorted(counts)}


def _unreached_experts(experts: Mapping[str, list[int]]) -> list[str]:
    return [f"{layer} expert {number}" for layer, counts in experts.items() for number, n in enumerate(counts) if not n]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
