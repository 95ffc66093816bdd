"""What an engine has done so far, in numbers."""

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Statistics"]


@dataclass(slots=True)
class Statistics:
    """Counted by the engine's thread since it started; others read single numbers.

    Attributes:
        waiting: Requests that have no slot now.
        running: Requests that have one.
        held_tokens: Tokens in the slots of those that run.
        finished: Requests that have ended, by reason.
        prompt_tokens: Of prompts that were read.
        cached_tokens: Of these, those that were copied from other sequences.
        generated_tokens: That were chosen.
        steps: That ran anything.
        prefill_seconds: In calls that read prompts.
        decode_seconds: In calls that decode, or that verify what was drafted.
        step_seconds: Of whole steps; what is not in the two above is the runtime's own work.
        drafted_tokens: That were guessed.
        accepted_tokens: Of these, those that were right.
        adapters_in_use: Adapters that running requests have now.
        adapter_loads: How often an adapter was read into memory.
        adapter_requests: Requests that began with an adapter, by its name.
    """

    waiting: int = 0
    running: int = 0
    held_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    step_seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    adapters_in_use: int = 0
    adapter_loads: int = 0
    adapter_requests: Counter[str] = field(default_factory=Counter)
