"""Documents out of text, JSON lines and Parquet files, in an order that a seed draws."""

import json
import mmap
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmopt.optimizer.calibration import Form
from llmopt.optimizer.errors import InputError, MissingExtraError

__all__ = ["Document", "read_documents"]


@dataclass(frozen=True, slots=True)
class Document:
    """One text or conversation.

    Attributes:
        where: File and line or row, for messages.
        value: What the file holds: a string, or a list of chat messages.
    """

    where: str
    value: Any


def read_documents(path: Path, form: Form, *, name: str, field: str, generator: torch.Generator) -> Iterator[Document]:
    """Every document of a file, once each. No more than one line, or one row group, is in memory at a time.

    Args:
        path: The file.
        form: What kind of file it is. A text file is a single document.
        name: What messages call the file.
        field: Of each line or row.
        generator: Draws the order. Rows of Parquet are drawn group by group.

    Raises:
        InputError: The file cannot be read, or a document that was drawn is not what it should be; with its line.
        MissingExtraError: Parquet without pyarrow.
    """
    try:
        if form == "text":
            yield _whole(path, name)
        elif form == "jsonl":
            yield from _lines(path, name, field, generator)
        else:
            yield from _rows(path, name, field, generator)
    except OSError as error:
        raise InputError(f"cannot read the text {name}: {error.strerror or error}") from error


def _whole(path: Path, name: str) -> Document:
    content = path.read_bytes()
    try:
        return Document(name, content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _not_utf8(f"{name}:{line}", error) from error


def _lines(path: Path, name: str, field: str, generator: torch.Generator) -> Iterator[Document]:
    if path.stat().st_size == 0:
        return
    starts = array("q", [0])
    with path.open("rb") as file:
        for line in file:
            starts.append(starts[-1] + len(line))
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for index in torch.randperm(len(starts) - 1, generator=generator).tolist():
                line = content[starts[index] : starts[index + 1]].strip()
                if line:
                    where = f"{name}:{index + 1}"
                    yield Document(where, _value(_record(line, where), field, where))


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from error
    except ValueError as error:
        raise InputError(f"{where}: is not JSON: {error}", hint="each line is one JSON object") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: is a {_kind(record)}, not an object", hint="each line is one JSON object")
    return record


def _rows(path: Path, name: str, field: str, generator: torch.Generator) -> Iterator[Document]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise _no_field(name, field, names)
            first_row = [0]
            for group in range(file.num_row_groups):
                first_row.append(first_row[-1] + file.metadata.row_group(group).num_rows)
            for group in torch.randperm(file.num_row_groups, generator=generator).tolist():
                column = file.read_row_group(group, columns=[field]).column(field)
                for row in torch.randperm(len(column), generator=generator).tolist():
                    yield Document(f"{name} row {first_row[group] + row + 1}", column[row].as_py())
    except pa.ArrowException as error:
        raise InputError(f"{name} is no readable Parquet file: {error}") from error


def _value(record: dict[str, Any], field: str, where: str) -> Any:
    if field not in record:
        raise _no_field(where, field, list(record))
    return record[field]


def _no_field(where: str, field: str, fields: list[str]) -> InputError:
    found = ", ".join(sorted(fields)) or "none"
    return InputError(f"{where}: has no field {field!r}", hint=f"calibration.field names one; its fields: {found}")


def _not_utf8(where: str, error: UnicodeDecodeError) -> InputError:
    what = f"{where}: is not UTF-8 text: byte 0x{error.object[error.start]:02x}"
    return InputError(what, hint="convert it, for example with iconv")


def _kind(value: object) -> str:
    return {list: "list", str: "string", bool: "boolean", int: "number", float: "number"}.get(type(value), "null")
