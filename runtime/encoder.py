"""Vectors of texts out of a build: tokenizer, engine and prompts in one object, without torch or the compiler."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llmopt.optimizer.errors import InputError
from llmopt.optimizer.manifest import MANIFEST_NAME, Manifest, sha256_of
from llmopt.runtime.backends.base import FloatArray
from llmopt.runtime.backends.opening import Executor, open_encoder_backend, pick_encoder
from llmopt.runtime.build import default_threads, refuse_rejected
from llmopt.runtime.text import Tokenizer

__all__ = ["Encoded", "Encoder"]


class Encoded(NamedTuple):
    """Vectors, and what they were made of.

    Attributes:
        vectors: float32 ``[texts, dimensions]``.
        tokens: Of each text, special ones and the prompt included, as the engine read it.
        cut: Numbers of the texts that were cut.
    """

    vectors: FloatArray
    tokens: list[int]
    cut: list[int]


class Encoder:
    """A build of an encoder, ready to run. Calls come from one thread at a time.

    Args:
        directory: The build.
        threads: Of one run on the CPU; the cores this process may use when omitted.
        executor: Which engine is executed, and by what; see ``Executor``.
        verify: Whether to compare every file's digest; sizes are always compared.
        force: Whether to open a build that missed its gates.

    Raises:
        InputError: No build there, or one of a decoder.
        RejectedError: The build missed its gates.
        VerificationError: A file is not what the manifest says.
        MissingExtraError: What executes the engine is not installed.
        UnsupportedError: The engine cannot be executed here.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        threads: int | None = None,
        executor: Executor | None = None,
        verify: bool = False,
        force: bool = False,
    ) -> None:
        executor = executor or Executor()
        directory = Path(directory)
        self.manifest = Manifest.load(directory, verify=verify)
        if self.manifest.verdict.status == "rejected":
            refuse_rejected(directory, self.manifest, force=force)
        self.engine = pick_encoder(directory, self.manifest, executor)
        self.fingerprint = "fp_" + sha256_of(directory / MANIFEST_NAME)[:16]
        self._tokenizer = Tokenizer(directory)
        self._backend = open_encoder_backend(directory, self.engine, executor, threads=threads or default_threads())

    @property
    def dimensions(self) -> int:
        """Columns of a vector."""
        return self.engine.hidden_size

    def encode(
        self,
        texts: Sequence[str | Sequence[int]] | str,
        *,
        prompt: str | None = None,
        cut: bool = True,
        batch: int = 32,
    ) -> FloatArray:
        """The vector of each text, float32 ``[texts, dimensions]``; see ``encode_counted``."""
        return self.encode_counted(texts, prompt=prompt, cut=cut, batch=batch).vectors

    def encode_counted(
        self,
        texts: Sequence[str | Sequence[int]] | str,
        *,
        prompt: str | None = None,
        cut: bool = True,
        batch: int = 32,
    ) -> Encoded:
        """The vector of each text, and how many tokens it has.

        Args:
            texts: Some texts, or one; a list of token ids is taken as it is, without special tokens or prompt.
            prompt: The name of the prompt that each is read behind; None: the model's default, if it has one.
            cut: Whether texts longer than the engine takes are cut, as sentence-transformers does; else they are
                refused.
            batch: Texts in one call of the engine.

        Raises:
            InputError: There is no such prompt, a text is too long and ``cut`` is off, or the tokenizer makes nothing
                of it.
            ExecutionError: A run failed.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        before = self._prompt(prompt)
        ids = [
            self._tokenizer.encode(before + text, add_special_tokens=True) if isinstance(text, str) else list(text)
            for text in given
        ]
        long = [i for i, row in enumerate(ids) if len(row) > self.engine.capacity]
        if long and not cut:
            raise InputError(
                f"text {long[0]} has {len(ids[long[0]])} tokens, the model takes {self.engine.capacity}",
                hint="cut the text, or split it",
            )
        for i in long:
            text, capacity = given[i], self.engine.capacity
            ids[i] = self._tokenizer.encode_cut(before + text, capacity) if isinstance(text, str) else ids[i][:capacity]
        return Encoded(self._backend.vectors(ids, batch=batch), [len(row) for row in ids], long)

    def _prompt(self, name: str | None) -> str:
        name = self.engine.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in self.engine.prompts:
            known = ", ".join(self.engine.prompts) or "none"
            raise InputError(f"the model has no prompt {name!r}", hint=f"its prompts: {known}")
        return self.engine.prompts[name]
