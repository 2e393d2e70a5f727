import pytest

from charlstm.config import base_config
from charlstm.data.cleaning import Cleaning
from charlstm.data.corpus import open_corpus
from charlstm.sweep import texts


@pytest.mark.parametrize(
    "cleaning",
    [
        Cleaning(),
        Cleaning(lowercase=True),
        Cleaning(strip_punctuation=True),
        Cleaning(lowercase=True, strip_punctuation=True, separator="\n%\n"),
    ],
)
def test_seen_part_is_what_train_reads_without_the_last_tenth(cleaning, book, tmp_path, caplog):
    frame = "*** {} OF THE PROJECT GUTENBERG EBOOK X ***\n"
    body = book[:3000] + "\n%\n" + "İstanbul, Straße!\r\n" * 20 + book[3000:]
    content = "\ufeffheader\n" + frame.format("START") + body + frame.format("END") + "licence\n"
    (tmp_path / "book.txt").write_bytes(content.encode())
    caplog.set_level("INFO", "charlstm")
    text = texts.open_text(str(tmp_path / "book.txt"), cleaning)
    assert "Project Gutenberg" in caplog.text
    texts.write_seen_part(text, cleaning, tmp_path / "texts" / "cut.txt")

    data = base_config().data
    data.lowercase, data.strip_punctuation, data.document_separator = cleaning
    whole, cut = (open_corpus(data, str(tmp_path / name)) for name in ("book.txt", "texts/cut.txt"))
    characters, seen = whole.vocab.decode(whole.ids_M), cut.vocab.decode(cut.ids_M)
    if cleaning.separator:
        seen = seen.removesuffix("\x03")  # the cut ends a document
    # As charlstm.data.batches.split counts.
    assert len(seen) == len(characters) - round(len(characters) * 0.1)
    assert characters.startswith(seen)


def test_validation_part_is_a_twentieth_of_the_whole_text():
    seen = 100_000 - round(100_000 * texts.UNSEEN_FRACTION)
    assert round(seen * texts.VAL_FRACTION) == 5_000


def test_text_name_depends_on_the_content(tmp_path):
    path, names = tmp_path / "my text.old.txt", set()
    for content in ("abc", "abd"):
        path.write_text(content)
        names.add(texts.open_text(str(path), Cleaning()).name)
    assert len(names) == 2
    assert {name.split("-")[0] for name in names} == {"my_text"}


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7, 99])
def test_first_chars_do_not_depend_on_chunks(count):
    assert "".join(texts.first_chars(["abc", "", "defg"], count)) == "abcdefg"[:count]
