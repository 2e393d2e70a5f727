"""Files come back byte for byte, and their size is the loss of the model."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from etils import epath
from helpers import random_params
from hypothesis import given
from hypothesis import strategies as st

from charlstm import CharLSTM, Vocab, zero_carry
from charlstm.errors import RunError, UserError
from charlstm.evaluation import coding, compression
from charlstm.runs.folder import load_run

VOCAB = Vocab(sorted("\x03\n abcdeé"))
MODEL = CharLSTM(vocab_size=len(VOCAB), hidden_size=8, end_id=0)
TEXT = b"a bad\nbead\n" * 4


@pytest.fixture(scope="module")
def trained():
    """Return (run, model, params) of made-up weights."""
    run = load_run(epath.Path(ROOT / "tests" / "fixtures" / "run_schema_1"))
    return run._replace(vocab=VOCAB), MODEL, random_params(MODEL)


def nats_of(model, params, ids_L):
    """Return the nats of the characters of one part, by one call of the model on all of it."""
    logits_1LV, _ = model.apply({"params": params}, jnp.asarray(ids_L)[None], zero_carry(model, 1))
    logits_LV = np.asarray(logits_1LV[0], np.float64)
    probs_LV = np.exp(logits_LV) / np.exp(logits_LV).sum(axis=1, keepdims=True)
    chosen_L = probs_LV[np.arange(len(ids_L) - 1), ids_L[1:]]
    return math.log(model.vocab_size) - np.log(chosen_L).sum()


FILES = st.binary(max_size=30) | st.text("ab\r\né\x03\ufeffA€\u2028", max_size=30).map(str.encode)


@given(FILES)
def test_any_file_comes_back_byte_for_byte(trained, raw):
    found = compression.compress(*trained, raw)
    assert compression.decompress(*trained, found.raw, "file") == raw
    assert found.num_coded <= found.num_chars


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"a",
        b"\n",
        "é€".encode(),
        b"\xef\xbb\xbfabc",
        b"a\r\nb\nc\r",
        "abc".encode("utf-16"),
        b"\xed\xa0\x80\xff",
        bytes(range(256)),
        b"a\x03b",
    ],
)
def test_strange_files_come_back(trained, raw):
    assert compression.decompress(*trained, compression.compress(*trained, raw).raw, "file") == raw


def test_only_unknown_characters_are_escapes():
    found = compression.split_text("A bad Café\n€".encode(), VOCAB)
    assert VOCAB.decode(found.ids_M) == " bad aé\n"
    assert found.num_chars == 12
    # Where all lines end in CR LF, none of them is an escape.
    found = compression.split_text(TEXT.replace(b"\n", b"\r\n"), VOCAB)
    assert (VOCAB.decode(found.ids_M).encode(), found.escapes) == (TEXT, b"")
    assert compression.split_text(TEXT + b"\r\n", VOCAB).escapes


# The last of these has rows 5, 5 and 3 long; in the other one, the last of six rows is empty.
@pytest.mark.parametrize(("part_chars", "max_parts", "num_chars"), [(2, 6, 13), (5, 9, 13)])
def test_parts_are_coded_with_the_loss_of_each_part_alone(
    trained, monkeypatch, part_chars, max_parts, num_chars
):
    _, model, params = trained
    monkeypatch.setattr(coding, "PART_CHARS", part_chars)
    monkeypatch.setattr(coding, "MAX_PARTS", max_parts)
    ids_M = np.random.default_rng(0).integers(0, len(VOCAB), num_chars).astype(np.uint8)
    counts = []
    found = coding.encode(model, params, ids_M, counts.append)
    assert sum(counts) == num_chars
    length = -(-num_chars // found.num_parts)
    parts = [ids_M[start : start + length] for start in range(0, num_chars, length)]
    assert found.num_parts in (len(parts), len(parts) + 1)
    wanted = sum(nats_of(model, params, part) for part in parts)
    assert found.nats == pytest.approx(wanted, rel=1e-5)
    np.testing.assert_array_equal(coding.decode(model, params, found.raw, num_chars), ids_M)


def test_the_size_is_the_loss(trained):
    found = compression.compress(*trained, TEXT * 50)
    bits = found.nats / math.log(2)
    head = 8 * len(compression.compress(*trained, b"").raw)
    # The coder rounds probabilities to 2**-24, and its last words up.
    assert bits <= 8 * len(found.raw) - head <= bits * 1.001 + 64
    report = str(found)
    assert f"{8 * len(found.raw) / 2200:.4f} bits per character" in report
    assert f"{bits / 2200:.4f} bits per character" in report


def test_other_probabilities_are_noticed(trained, monkeypatch):
    run, model, params = trained
    content = compression.compress(*trained, TEXT).raw
    others = jax.tree.map(lambda leaf: leaf * np.float32(1.001), params)
    with pytest.raises(UserError, match=r"^a\.clstm: .*other weights .*--workdir"):
        compression.decompress(run, model, others, content, "a.clstm")
    crc = compression.weights_crc(run, params)
    monkeypatch.setattr(compression, "weights_crc", lambda *arguments: crc)
    here = rf"^a\.clstm: .*probabilities .*jax {jax.__version__} .*this machine"
    with pytest.raises(UserError, match=here):
        compression.decompress(run, model, others, content, "a.clstm")
    monkeypatch.setattr(compression, "_machine_crc", lambda: 0)
    with pytest.raises(UserError, match="another kind of machine"):
        compression.decompress(run, model, others, content, "a.clstm")


def test_a_damaged_foreign_or_newer_file_is_refused(trained):
    content = compression.compress(*trained, TEXT).raw
    for place in range(6, len(content), 5):
        damaged = bytearray(content)
        damaged[place] ^= 4
        with pytest.raises(UserError, match=r"^a\.clstm: .*damaged"):
            compression.decompress(*trained, bytes(damaged), "a.clstm")
    for end in range(5, len(content), 7):
        with pytest.raises(UserError, match=r"^a\.clstm: .*cut off"):
            compression.decompress(*trained, content[:end], "a.clstm")
    with pytest.raises(UserError, match=r"^a\.clstm: .*version 2, newer than 1"):
        compression.decompress(*trained, content[:5] + b"\x02" + content[6:], "a.clstm")
    for foreign in (b"", b"CLST", b"PK\x03\x04" + content):
        with pytest.raises(UserError, match=r"^a\.clstm: is no file of"):
            compression.decompress(*trained, foreign, "a.clstm")


def test_weights_that_are_nan_are_refused(trained):
    run, model, params = trained
    nan = jax.tree.map(lambda leaf: leaf * np.float32("nan"), params)
    with pytest.raises(RunError, match=r"NaN.*--checkpoint"):
        compression.compress(run, model, nan, TEXT)


def test_a_missing_coder_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(UserError, match=r"constriction; pip install -e '\.\[compress\]'"):
        coding.import_coder()
