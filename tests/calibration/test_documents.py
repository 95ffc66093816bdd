"""Documents out of files, and where a file is not what it should be."""

import json
import sys

import pytest
import torch

from llmopt.calibration.documents import read_documents
from llmopt.optimizer.errors import InputError, MissingExtraError


@pytest.fixture
def read(tmp_path):
    """Reads a file of the given contents; returns its documents as drawn."""

    def read_(content, form="jsonl", *, field="text", seed=0):
        path = tmp_path / "file"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        generator = torch.Generator().manual_seed(seed)
        return list(read_documents(path, form, name="some.file", field=field, generator=generator))

    return read_


def lines(count):
    return "".join(json.dumps({"text": f"number {index}"}) + "\n" for index in range(1, count + 1))


def test_a_text_file_is_one_document(read):
    (document,) = read("one\n\ntwo\n", "text")
    assert (document.where, document.value) == ("some.file", "one\n\ntwo\n")


def test_every_line_is_drawn_once_and_knows_its_number(read):
    found = read(lines(50))
    assert {each.where: each.value for each in found} == {f"some.file:{n}": f"number {n}" for n in range(1, 51)}


def test_the_seed_draws_the_order(read):
    orders = [[each.where for each in read(lines(50), seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_empty_lines_and_a_missing_last_line_end_do_no_harm(read):
    found = read(b'\n{"text": "a"}\r\n   \n{"text": "b"}')
    assert sorted((each.where, each.value) for each in found) == [("some.file:2", "a"), ("some.file:4", "b")]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_missing_file_is_named(form, tmp_path):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    documents = read_documents(tmp_path / "none", form, name="none.x", field="text", generator=torch.Generator())
    with pytest.raises(InputError, match=r"cannot read the text none\.x"):
        list(documents)


def test_an_empty_file_has_no_documents(read):
    assert read("") == []


@pytest.mark.parametrize(
    ("line", "said", "hint"),
    [
        ('{"text": ', "some.file:2: is not JSON", "one JSON object"),
        ("[1, 2]", "some.file:2: is a list, not an object", "one JSON object"),
        ("3.5", "some.file:2: is a number, not an object", "one JSON object"),
        ('{"id": 1, "body": ""}', "some.file:2: has no field 'text'", "its fields: body, id"),
        (b'{"text": "caf\xe9"}', "some.file:2: is not UTF-8 text: byte 0xe9", "iconv"),
    ],
)
def test_a_bad_line_is_named(read, line, said, hint):
    content = b'{"text": "good"}\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n"
    with pytest.raises(InputError, match=said) as caught:
        read(content)
    assert hint in caught.value.hint


def test_the_line_of_a_text_that_is_not_utf8_is_named(read):
    with pytest.raises(InputError, match=r"some\.file:3: is not UTF-8 text: byte 0xff"):
        read(b"one\ntwo\nth\xffree\n", "text")


def test_parquet_gives_every_row_once(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"id": list(range(25)), "text": [f"number {n}" for n in range(1, 26)]})
    parquet.write_table(table, tmp_path / "file", row_group_size=10)
    orders = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        orders.append(list(read_documents(tmp_path / "file", "parquet", name="f", field="text", generator=generator)))
    assert {each.where: each.value for each in orders[0]} == {f"f row {n}": f"number {n}" for n in range(1, 26)}
    assert orders[0] != orders[1]


def test_parquet_without_the_field_or_of_another_kind_is_refused(tmp_path, read):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"body": ["a"]}), tmp_path / "other")
    documents = read_documents(tmp_path / "other", "parquet", name="f", field="text", generator=torch.Generator())
    with pytest.raises(InputError, match="f: has no field 'text'") as caught:
        list(documents)
    assert "body" in caught.value.hint
    with pytest.raises(InputError, match=r"some\.file is no readable Parquet file"):
        read("hello", "parquet")


def test_without_pyarrow_the_extra_is_named(read, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError) as caught:
        read("", "parquet")
    assert "llmopt[parquet]" in caught.value.hint
