"""The calibration text of a build: what the recipe's ``calibration:`` names, or text sampled from the model itself."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from llmopt.calibration.documents import read_documents
from llmopt.calibration.encoding import Encoder
from llmopt.calibration.overlap import check_disjoint
from llmopt.calibration.packing import concatenated, padded
from llmopt.calibration.sampling import Sampling, sample_tokens, sampling_key
from llmopt.optimizer.cache import digest_of
from llmopt.optimizer.calibration import Calibration, Form, form_of
from llmopt.optimizer.digests import file_digests
from llmopt.optimizer.errors import InputError
from llmopt.optimizer.hub import dataset_file
from llmopt.optimizer.manifest import CalibrationEntry
from llmopt.optimizer.model import Model
from llmopt.optimizer.recipe import Recipe
from llmopt.optimizer.tokens import Tokens

__all__ = ["CalibrationData", "calibration_of", "checked_calibration"]

_LONGEST_SAMPLED = 256
"""Tokens of a sampled text. A decoding step costs more the longer the text before it is, so that 512 texts of 256
tokens are written in a fraction of the time of 128 texts of 1024."""


def calibration_of(
    recipe: Recipe,
    model: Model,
    *,
    cache: Path,
    offline: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> "CalibrationData | None":
    """The calibration text of ``recipe``; None where no pass of it looks at any.

    Args:
        recipe: Its ``calibration:`` names the text.
        model: The source model, which tokenizes it, or writes it where nothing is named.
        cache: Where digests are kept.
        offline: Whether hubs are left alone.
        progress: Called with (finished, total) steps of sampling.

    Raises:
        InputError: The source is missing, or the windows are longer than the model's context.
    """
    if not recipe.needs_calibration:
        return None
    settings = recipe.calibration or Calibration()
    longest = model.decoder.max_positions
    if settings.tokens > longest:
        if "tokens" in settings.model_fields_set:
            raise InputError(
                f"calibration.tokens is {settings.tokens}, the model's context has {longest} tokens",
                hint=f"set it to {longest} or less, or leave it out",
            )
        settings = settings.model_copy(update={"tokens": longest})
    threads, seed = recipe.resources.thread_count, recipe.seed if settings.seed is None else settings.seed
    if settings.source is None:
        wanted = Sampling("calibration", settings.samples, settings.tokens, seed=seed, longest=_LONGEST_SAMPLED)
        return CalibrationData(
            settings,
            seed,
            digest=digest_of(sampling_key(model, wanted)),
            make=lambda: sample_tokens(model, wanted, threads=threads, progress=progress),
        )
    path = _located(settings, settings.source, recipe.base, offline=offline)
    content = file_digests({"text": path}, cache)["text"]
    chosen = settings.model_dump(include={"field", "samples", "tokens", "packing"})
    return CalibrationData(
        settings,
        seed,
        digest=digest_of([content, _form(settings, path), chosen, seed, model.source.digest]),
        make=lambda: _read(path, settings, model, content, seed),
    )


def checked_calibration(
    recipe: Recipe,
    model: Model,
    evaluation: Sequence[Tokens],
    *,
    cache: Path,
    offline: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> "CalibrationData | None":
    """``calibration_of``, made at once and compared with the texts of ``evaluation``, before any pass runs.

    Raises:
        InputError: As there; or a text cannot be used, or shares its text with one of ``evaluation``.
    """
    found = calibration_of(recipe, model, cache=cache, offline=offline, progress=progress)
    if found is not None:
        check_disjoint(found.tokens(), evaluation, decode=lambda ids: Encoder(model.source.tokenizer_dir).decode(ids))
    return found


@dataclass(frozen=True)
class CalibrationData:
    """Calibration text that is made when it is first asked for; a ``CalibrationText``.

    Attributes:
        settings: With every default filled in.
        seed: That draws or samples the windows.
        digest: Of everything that determines the windows.
        make: Makes them.
    """

    settings: Calibration
    seed: int
    digest: str
    make: Callable[[], Tokens]

    def tokens(self) -> Tokens:
        """The windows, made once.

        Raises:
            InputError: The text cannot be read, is too short, or is not what the recipe says.
        """
        return self._tokens

    @cached_property
    def _tokens(self) -> Tokens:
        return self.make()

    def entry(self) -> CalibrationEntry:
        """What the manifest says about it."""
        text, settings = self.tokens(), self.settings
        return CalibrationEntry(
            name=text.name,
            digest=text.digest,
            samples=settings.samples,
            tokens=settings.tokens,
            packing=settings.packing,
            seed=self.seed,
        )


def _located(settings: Calibration, source: str, base: Path, *, offline: bool) -> Path:
    """The file that the recipe names; one that exists counts more than a data set of that name."""
    path = base / Path(source).expanduser()
    if path.is_file():
        return path
    if settings.is_dataset:
        return dataset_file(source, lambda names: _chosen(names, settings), offline=offline)
    raise InputError(
        f"calibration.source: there is no file {path}", hint="a data set of the hub is written org/name@commit"
    )


def _chosen(names: Sequence[str], settings: Calibration) -> str:
    """The file of a data set that ``file`` names, or the first of ``split``.

    Raises:
        InputError: There is none, or more than one that is first.
    """
    if settings.file is not None:
        if settings.file in names:
            return settings.file
        raise InputError(f"{settings.source} has no file {settings.file}", hint=f"it has {_some(names)}")
    split = settings.split or "train"
    fitting = [name for name in names if Path(name).suffix and _is_of(name, split)]
    first = [name for name in fitting if "-of-" not in name or "-00000-of-" in name]
    if len(first) == 1:
        return first[0]
    count, choices = (len(first), _some(first)) if first else ("no", _some(names))
    raise InputError(
        f"{settings.source} has {count} files of the split {split}", hint=f"calibration.file names one: {choices}"
    )


def _is_of(name: str, split: str) -> bool:
    """Whether the file is one of that split: a folder is called so, or the file begins with it."""
    parts = Path(name).parts
    try:
        form_of(name)
    except ValueError:
        return False
    return split in parts[:-1] or parts[-1].split(".")[0].split("-")[0] == split


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "no files"


def _form(settings: Calibration, path: Path) -> Form:
    return settings.format or form_of(path.name)


def _read(path: Path, settings: Calibration, model: Model, content: str, seed: int) -> Tokens:
    """The windows of a file whose sha256 is ``content``."""
    assert settings.source is not None
    name, generator = settings.source, torch.Generator().manual_seed(seed)
    form, encoder = _form(settings, path), Encoder(model.source.tokenizer_dir)
    documents = read_documents(path, form, name=name, field=settings.field, generator=generator)
    encoded: Iterator[list[int]] = map(encoder.encode, documents)
    size, end = {"windows": settings.samples, "tokens": settings.tokens}, _end(model)
    if settings.packing == "pad":
        ids, lengths = padded(encoded, **size, padding=end or 0, name=name)
        return Tokens(name, _checked(ids, model, name), content, lengths)
    ids = concatenated(encoded, **size, end=end, name=name, generator=generator)
    return Tokens(name, _checked(ids, model, name), content)


def _end(model: Model) -> int | None:
    """The end-of-text token, of which a model may have several."""
    ends = model.config.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    return next(iter(listed), None)


def _checked(ids: torch.Tensor, model: Model, name: str) -> torch.Tensor:
    """``ids``, when the model knows all of them.

    Raises:
        InputError: The tokenizer has tokens that the model lacks.
    """
    largest = int(ids.max())
    if largest >= model.decoder.vocab_size:
        raise InputError(
            f"{name} holds token {largest}, the model has {model.decoder.vocab_size}",
            hint="its tokenizer is another model's",
        )
    return ids
