"""Scores of texts: sums, formats, streams and characters that the model does not know."""

import io
import json
import re

import jax
import numpy as np
import pytest
from conftest import ROOT
from etils import epath
from helpers import random_params
from ml_collections import ConfigDict

from charlstm import Vocab
from charlstm.data.vocab import END
from charlstm.errors import RunError, UserError
from charlstm.evaluation import score, score_formats
from charlstm.evaluation.surprise import predict_text
from charlstm.model import model_from_config
from charlstm.runs.folder import load_run

TEXT = "The count came\nto a castle.\n\nLucy not said I saw\nBlood"


NUM_CHARS = 60  # of each vocabulary, so that all models have one shape and compile once
FILLING = "".join(map(chr, range(0x2500, 0x2500 + NUM_CHARS)))


def made_up(characters, **data):
    """Return (run, model, params) of made-up weights, which knows `characters`."""
    run = load_run(epath.Path(ROOT / "tests" / "fixtures" / "run_schema_1"))
    config = ConfigDict(run.config.to_dict())
    config.data.update(data)
    config.model.update({"num_layers": 1, "multiplicative": False, "recurrent_rms_norm": False})
    known = sorted(set(characters))
    run = run._replace(vocab=Vocab(known + list(FILLING[len(known) :])), config=config)
    model = model_from_config(config, run.vocab)
    return run, model, random_params(model)


@pytest.fixture(scope="module")
def trained():
    """Return (run, model, params) that knows the characters of TEXT."""
    return made_up(TEXT)


def texts_of(trained, *sources, stdin=None, **options):
    return score.score_texts(*trained, score.find_texts(sources), stdin, **options)


def consume(items):
    """Iterate over all items."""
    for _ in items:
        pass


@pytest.fixture
def file_of(tmp_path):
    """Return write(name, content) -> the path of a file, as text."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def written(trained, texts, kind, by="line", is_ranked=False):
    """Return what a format writes."""
    out = list[str]()
    getattr(score_formats, f"write_{kind}")(texts, trained[0], by, is_ranked, out.append)
    return "".join(out)


def test_sums_are_those_of_all_predicted_characters(trained, file_of):
    run, model, params = trained
    [text] = texts_of(trained, file_of("a.txt", TEXT))
    assert "".join(piece.text for piece in text.pieces) == TEXT
    bits_M = predict_text(model, params, run.vocab.encode(TEXT)).bits_M[1:]
    found = text.totals.metrics()
    assert found == pytest.approx(
        {
            "characters": len(TEXT) - 1,
            "bits": bits_M.sum(),
            "bits_per_char": bits_M.mean(),
            "bits_per_byte": bits_M.mean(),  # in ASCII
            "perplexity": 2 ** bits_M.mean(),
        },
        rel=1e-6,
    )


def test_bytes_are_counted_only_where_the_model_reads_the_text(trained, file_of):
    accents = made_up("aéb€ ")
    path = file_of("a.txt", "aé€ b")
    [text] = texts_of(accents, path)
    consume(text.pieces)
    metrics = text.totals.metrics()
    assert metrics["bits"] / metrics["bits_per_byte"] == pytest.approx(len("é€ b".encode()))
    for others, options in (
        (made_up("aéb€ ", lowercase=True), {}),
        (made_up("aéb "), {"unknown": "drop"}),
        (made_up("aéb "), {"unknown": "replace"}),
    ):
        [text] = texts_of(others, path, **options)
        consume(text.pieces)
        assert text.totals.metrics()["bits_per_byte"] is None


@pytest.mark.parametrize("by", ["char", "word", "line"])
def test_formats_agree(trained, by, file_of):
    paths = file_of("a.txt", TEXT), file_of("b.txt", TEXT[4:])
    read = lambda: texts_of(trained, *paths, num_top=score.NUM_TOP)  # noqa: E731
    found = json.loads(written(trained, read(), "json", by))
    units = [{"file": text["file"]} | unit for text in found["texts"] for unit in text["units"]]
    for text, content in zip(found["texts"], (TEXT, TEXT[4:]), strict=True):
        assert "".join(unit["text"] for unit in text["units"]) == content
        total = sum(unit["bits"] or 0 for unit in text["units"])
        assert total == pytest.approx(text["total"]["bits"], abs=1e-4)
    assert found["total"]["characters"] == 2 * len(TEXT) - 6
    lines = map(json.loads, written(trained, read(), "json_lines", by).splitlines())
    assert [line for line in lines if "total" not in line] == units
    title, *rows = written(trained, read(), "tsv", by).splitlines()
    assert title.split("\t") == list(units[0])
    for row, unit in zip(rows, units, strict=True):
        cells = dict(zip(units[0], row.split("\t"), strict=True))
        assert cells["text"].encode().decode("unicode_escape") == unit["text"]
        assert cells["bits"] == ("" if unit["bits"] is None else f"{unit['bits']:.6f}")
    table = written(trained, read(), "table", by)
    for unit in units:
        assert f" {unit['bits'] or 0:.2f} " in table or unit["bits"] is None
    assert re.search(rf"total +{found['total']['characters']} ", table)


def test_characters_have_the_most_probable_alternatives(trained, file_of):
    run, model, params = trained
    [text] = texts_of(trained, file_of("a.txt", TEXT), num_top=score.NUM_TOP)
    first, *units = score_formats.read_records(text, run, "char", False)
    assert (first["text"], first["bits"], first["rank"]) == ("T", None, None)
    wanted = predict_text(model, params, run.vocab.encode(TEXT), num_top=score.NUM_TOP)
    for place, unit in enumerate(units, 1):
        assert unit["rank"] == wanted.rank_M[place]
        assert unit["entropy"] == pytest.approx(wanted.entropy_M[place])
        assert "".join(char for char, _ in unit["top"]) == run.vocab.decode(
            wanted.top_ids_MK[place]
        )
        np.testing.assert_allclose([p for _, p in unit["top"]], wanted.top_probs_MK[place], 1e-4)


@pytest.mark.parametrize(("by", "key"), [("line", "bits_per_char"), ("word", "bits")])
def test_ranked_units_are_in_descending_order(trained, by, key, file_of):
    path, texts = file_of("a.txt", "\n" + TEXT), []
    for is_ranked in (False, True):
        [text] = texts_of(trained, path)
        texts.append(list(score_formats.read_records(text, trained[0], by, is_ranked)))
    plain, ranked = texts
    values = [unit[key] for unit in ranked if unit["characters"]]
    assert values == sorted(values, reverse=True)
    assert sorted(unit["text"] for unit in ranked) == sorted(unit["text"] for unit in plain)
    assert [unit["text"] for unit in plain] != [unit["text"] for unit in ranked]
    if by == "line":  # its newline is the first character
        assert (ranked[-1]["text"], ranked[-1][key]) == ("\n", None)


class Pipe(io.RawIOBase):
    """A pipe that gives one block at each read, after it has called `before_read`."""

    def __init__(self, blocks, before_read=lambda: None):
        self.blocks, self.before_read = iter(blocks), before_read

    def read(self, size=-1):
        self.before_read()
        return next(self.blocks, b"")


def test_a_stream_shows_each_line_before_it_reads_the_next(trained):
    blocks = [line.encode() for line in TEXT.splitlines(keepends=True)]
    out, lengths = list[str](), list[int]()
    stdin = Pipe(blocks, lambda: lengths.append(len(out)))
    texts = texts_of(trained, "-", stdin=stdin)
    score_formats.write_json_lines(texts, trained[0], "line", False, out.append)
    # The last line has no newline and is complete at the end.
    assert lengths == [0, 1, 2, 3, 4, 4]
    assert json.loads(out[2])["text"] == "\n"


def test_a_stream_in_any_blocks_has_the_scores_of_a_file(trained, file_of):
    accents = made_up(set(TEXT + "é€"))
    raw = (TEXT + "é€\r\nI\r\n").encode()
    wanted = written(accents, texts_of(accents, file_of("a.txt", raw)), "tsv", "word")
    assert "é€" in wanted
    for size in (1, 7, len(raw)):
        blocks = [raw[begin : begin + size] for begin in range(0, len(raw), size)]
        found = written(accents, texts_of(accents, "-", stdin=Pipe(blocks)), "tsv", "word")
        assert found.replace("-\t", "\t") == re.sub(r"\S*a\.txt\t", "\t", wanted)


def test_a_long_text_is_predicted_in_small_pieces(trained, file_of):
    lengths = []
    for stdin in (None, Pipe([TEXT.encode() * 200])):
        path = "-" if stdin else file_of("a.txt", TEXT * 200)
        [text] = texts_of(trained, path, stdin=stdin)
        lengths.append([len(piece.text) for piece in text.pieces])
        assert text.totals.num_chars == 200 * len(TEXT) - 1
    assert lengths[0] == lengths[1]
    assert max(lengths[0]) == score.PIECE_LEN


def test_texts_are_cleaned_as_that_of_the_run(trained, file_of):
    run = made_up("ab .\x03", lowercase=True, document_separator="##")
    [text] = texts_of(run, file_of("a.txt", "AB.##ba b"))
    assert "".join(piece.text for piece in text.pieces) == f"ab.{END}ba b{END}"
    [text] = texts_of(run, file_of("a.txt", "AB.##ba b"))
    records = score_formats.read_records(text, run[0], "char", False)
    assert [record["text"] for record in records] == [*"ab.", "##", *"ba b", "##"]


def test_a_header_is_cut_from_a_file_but_not_from_a_stream(trained, file_of, caplog):
    header = "*** START OF THE PROJECT GUTENBERG EBOOK X ***\n\n"
    run = made_up(set(TEXT + header))
    raw = (header + TEXT).encode()
    [text] = texts_of(run, file_of("a.txt", raw))
    assert "".join(piece.text for piece in text.pieces) == TEXT + "\n"
    assert "cut" in caplog.text
    [text] = texts_of(run, "-", stdin=Pipe([raw]))
    assert "".join(piece.text for piece in text.pieces) == header + TEXT


HOSTILE = "\x1b[31m a\tb\\n \x07\x9b\u202e</td>"


def test_no_format_writes_control_characters(trained, file_of):
    run = made_up(set(HOSTILE))
    path = file_of("a\n\x1b.txt", HOSTILE)
    for kind in ("table", "tsv", "json", "json_lines"):
        for by in ("char", "word", "line"):
            out = written(run, texts_of(run, path, num_top=score.NUM_TOP), kind, by)
            assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out)
            if kind == "tsv":
                assert {line.count("\t") for line in out.splitlines()} == {
                    len(score_formats.KEYS[by])
                }


MISTAKES = [
    (b"", {}, "a.txt 0 2"),
    (b"T", {}, "a.txt 1 2"),
    ("€€".encode(), {"unknown": "drop"}, "a.txt 0 2"),
    ("The €".encode(), {}, "a.txt '€' U+20AC 4 drop replace"),
    ("Käse".encode("latin1"), {}, "a.txt UTF-8 0xe4 1"),
    (b"\x89PNG\r\n\x1a\n\0\0\0\0\0\0\0\0\0\0", {}, "a.txt"),
    (b"PK\x03\x04xx", {}, "a.txt zip"),
]


@pytest.mark.parametrize(("raw", "options", "facts"), MISTAKES)
def test_an_unusable_text_is_an_error_before_any_output(trained, raw, options, facts, file_of):
    path = file_of("a.txt", raw)
    for source, stdin in ((path, None), ("-", Pipe([raw] if raw else []))):
        out = list[str]()
        texts = texts_of(trained, source, stdin=stdin, **options)
        with pytest.raises(UserError) as caught:
            score_formats.write_table(texts, trained[0], "line", False, out.append)
        for fact in facts.replace("a.txt", source).split():
            assert fact in str(caught.value)
        assert out == []


def test_texts_are_found_before_any_is_read(file_of, tmp_path):
    names = [file_of(name, TEXT) for name in ("b.txt", "a.txt")]
    found = score.find_texts([*names, "-", str(tmp_path)])
    shown = [source and source.path for source in found]
    assert shown == [*names, None, *names[::-1]]
    for paths in (["none.txt"], [""], ["-", "-"], ["gs://no/such"]):
        with pytest.raises(UserError):
            score.find_texts([*names, *paths])


def test_weights_that_are_not_finite_are_refused(trained, file_of):
    run, model, params = trained
    params = jax.tree.map(lambda leaf: leaf * np.nan, params)
    [text] = texts_of((run, model, params), file_of("a.txt", TEXT))
    with pytest.raises(RunError, match=r"a\.txt: .* nan.* --checkpoint"):
        consume(text.pieces)


def test_a_run_on_windows_does_not_predict_the_first_one(file_of):
    run = made_up(TEXT, order="windows")
    run[0].config.seq_len = 20
    [text] = texts_of(run, file_of("a.txt", TEXT))
    consume(text.pieces)
    assert text.totals.num_chars == len(TEXT) - 20
    [text] = texts_of(run, file_of("a.txt", TEXT[:20]))
    with pytest.raises(UserError, match=r"a\.txt: .* 20 .* 21"):
        consume(text.pieces)
