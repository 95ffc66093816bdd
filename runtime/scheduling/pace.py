"""How many prompt tokens a step may write, so that those who are decoding do not wait too long for their next token."""

from dataclasses import dataclass

__all__ = ["Pace", "moved"]

_WEIGHT = 0.2
"""Of a new measurement in a moving average."""


@dataclass(slots=True)
class Pace:
    """Learns what tokens cost, and turns a latency into a number of tokens.

    Attributes:
        target: Seconds that a step may take while requests decode; 0 or less for no limit.
        least: Tokens of a step in any case, so that prompts are not starved by decoding alone.
        most: Tokens of a step when nobody decodes.
        seconds_per_token: Of prompts, a moving average; 0 until something was measured.
        seconds_per_decode: Of the decode calls, a moving average.
    """

    target: float
    least: int
    most: int
    seconds_per_token: float = 0.0
    seconds_per_decode: float = 0.0

    def budget(self, decoding: int) -> int:
        """Prompt tokens for a step in which ``decoding`` requests decode.

        Reading gets the time that decoding leaves of the target, and at least as much as decoding takes: else, where
        the target cannot be kept at all, prompts would hardly be read and fewer and fewer requests decode together.
        """
        if not decoding or self.target <= 0 or not self.seconds_per_token:
            return self.most
        seconds = max(self.target - self.seconds_per_decode, self.seconds_per_decode)
        fitting = int(seconds / self.seconds_per_token)
        return min(max(fitting, self.least), self.most)

    def note_prefill(self, tokens: int, seconds: float) -> None:
        """Learn from a prefill call. Short ones are left out: most of their time does not depend on their length."""
        if tokens >= self.least:
            self.seconds_per_token = moved(self.seconds_per_token, seconds / tokens, _WEIGHT)

    def note_decode(self, seconds: float) -> None:
        """Learn from a decode call."""
        self.seconds_per_decode = moved(self.seconds_per_decode, seconds, _WEIGHT)

    def seconds_for(self, prompt: int, answer: int) -> float:
        """About how long a request takes once it runs: ``prompt`` tokens read and ``answer`` tokens written."""
        return prompt * self.seconds_per_token + answer * self.seconds_per_decode


def moved(average: float, value: float, weight: float) -> float:
    """A moving average behind one more value, which counts by ``weight``; the first value is the average."""
    return value if not average else average + weight * (value - average)
