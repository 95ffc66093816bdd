from pathlib import Path

from llmopt.benchmarks.texts import plain_text, tokens_of
from llmopt.optimizer.sources import load_model


def test_wikitext_marks_are_undone(tmp_path: Path) -> None:
    source = tmp_path / "wiki.valid.tokens"
    source.write_text(" = Title = \n A well @-@ known <unk> of 1 @,@ 000 m , or 3 @.@ 2 . \n")
    copy = plain_text(source, tmp_path / "out")
    assert copy.read_text() == " = Title = \n A well-known unk of 1,000 m , or 3.2 . \n"
    assert copy.is_relative_to(tmp_path / "out")


def test_other_text_stays_as_it_is(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("An e-mail to a@b.c, at <b>1,000</b>.\n")
    assert plain_text(source, tmp_path / "out").read_text() == source.read_text()


def test_windows_come_from_the_text_or_from_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_llama), cache=tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("The river comes down from the hills. " * 20)
    read = tokens_of(text, model, windows=2, tokens=16)
    sampled = tokens_of(None, model, windows=2, tokens=16)
    assert read.ids.shape == sampled.ids.shape == (2, 16)
    assert (read.name, read.is_sampled) == ("text.txt", False)
    assert sampled.is_sampled
