"""What an engine may trade for what: speed for exactness, one request's latency for all the others' throughput."""

import logging
from dataclasses import dataclass
from pathlib import Path

from llmopt.optimizer.errors import InputError
from llmopt.runtime.build import Build, open_build
from llmopt.runtime.speculation import DraftEngine, Drafter, PromptLookup, Speculation

__all__ = ["DEFAULT_TARGET", "Choices", "Policy", "default_policy", "policy_for"]

logger = logging.getLogger(__name__)

DEFAULT_TARGET = 0.1
"""Seconds that a step may take while requests decode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How an engine runs.

    Attributes:
        running: Requests that run at the same time; all slots when None. The other slots keep prompts that were read.
        is_exact: Whether answers must not depend on what else runs, or ran: then only what was computed as a prompt is
            shared, and nothing is guessed.
        shares_prefixes: Whether prompts may begin with what was computed for others.
        target: Seconds that a step may take while requests decode; 0 for no limit.
        speculation: Guesses tokens; needs ``is_exact`` to be False, since whether a guess is made depends on the load.
    """

    running: int | None = None
    is_exact: bool = True
    shares_prefixes: bool = True
    target: float = DEFAULT_TARGET
    speculation: Speculation | None = None

    def __post_init__(self) -> None:
        """Check that the parts agree.

        Raises:
            InputError: They do not.
        """
        if self.is_exact and self.speculation is not None:
            raise InputError(
                "speculation makes answers depend on the load in their last digits", hint="allow that with --no-exact"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What somebody who starts an engine may choose.

    Attributes:
        exact: Whether answers must not depend on the load; where None, they do not if the engine can promise it.
        prefix_cache: Whether prompts may begin with what was computed for others.
        latency_target: Seconds that a step may take while requests decode; 0 for no limit.
        speculate: Whether tokens are guessed from the text itself.
        draft: A build of a smaller model that guesses instead.
        draft_tokens: Guessed at once.
        threads: Of the smaller model.
    """

    exact: bool | None = None
    prefix_cache: bool = True
    latency_target: float = DEFAULT_TARGET
    speculate: bool = False
    draft: Path | None = None
    draft_tokens: int = 5
    threads: int | None = None


def default_policy(build: Build) -> Policy:
    """As exact as the build's engine is."""
    return policy_for(build, Choices())


def policy_for(build: Build, choices: Choices) -> Policy:
    """The policy that somebody chose for a build.

    Raises:
        InputError: What was chosen contradicts itself or the engine, or the smaller model has another vocabulary.
        LlmoptError: The smaller model cannot be opened.
    """
    can_be_exact = build.backend.engine.batch_invariant
    if choices.exact and not can_be_exact:
        raise InputError(
            f"the engine of {build.directory} cannot promise answers that do not depend on the load",
            hint="its manifest says batch_invariant: false; serve it without --exact",
        )
    is_exact = can_be_exact if choices.exact is None else choices.exact
    drafter = _drafter(build, choices)
    policy = Policy(
        running=build.sizes.running,
        is_exact=is_exact,
        shares_prefixes=choices.prefix_cache,
        target=choices.latency_target,
        speculation=None if drafter is None else Speculation(drafter, choices.draft_tokens),
    )
    logger.info("answers %s on what else runs", "do not depend" if is_exact else "may depend in their last digits")
    return policy


def _drafter(build: Build, choices: Choices) -> Drafter | None:
    if choices.draft is None:
        return PromptLookup() if choices.speculate else None
    draft = open_build(choices.draft, slots=1, kept_slots=0, threads=choices.threads)
    if not draft.tokenizer.has_vocabulary_of(build.tokenizer):
        raise InputError(
            f"{choices.draft} has another vocabulary than {build.directory}: its guesses would mean something else",
            hint="the smaller model has to be one of the same family",
        )
    return DraftEngine(draft.backend)
