"""Decoding of files, and messages about files that are not text."""

import bz2
import gzip
import lzma

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from charlstm.data.encoding import decode
from charlstm.errors import UserError


def decode_whole(raw, size=1):
    return "".join(decode((raw[i : i + size] for i in range(0, len(raw), size)), "a.txt"))


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", ""),
        ("one\r\n\u20ac\U0001f987".encode("utf-16"), "one\n\u20ac\U0001f987"),
        (b"\xfe\xff" + "one\n\u20ac".encode("utf-16-be"), "one\n\u20ac"),
        (b"\xef\xbb\xbfone\r\ntwo\r\n", "one\ntwo\n"),
        (b"one\r\r\n\ntwo\n\r", "one\n\n\ntwo\n\n"),
        # A byte-order mark is only at the beginning; elsewhere it is a character.
        ("\ufeffa\ufeffb \U0001f987".encode(), "a\ufeffb \U0001f987"),
    ],
)
def test_decode_drops_the_byte_order_mark_and_carriage_returns(raw, text):
    assert decode_whole(raw) == text


@given(st.text(max_size=20), st.booleans(), st.integers(1, 9), st.sampled_from([b"\xff", b"\xe4"]))
def test_invalid_byte_is_named_with_its_offset(text, has_mark, size, byte):
    before = b"\xef\xbb\xbf" * has_mark + text.replace("\x00", "").encode()
    with pytest.raises(UserError) as error:
        decode_whole(before + byte + b"A", size)
    assert f"(byte 0x{byte.hex()} at offset {len(before)})" in str(error.value)


WESTERN = "\u201cNo\u201d, the count said; na\u00efve. "
OTHER_KINDS = {
    "UTF-16 little": (WESTERN.encode("utf-16-le"), "iconv -f UTF-16LE"),
    "UTF-16 big": (WESTERN.encode("utf-16-be"), "iconv -f UTF-16BE"),
    "UTF-16 cut": (b"\xff\xfeA", "not UTF-16 (byte 0x41 at offset 2); the file is damaged"),
    "Windows-1252": (WESTERN.encode("cp1252"), "iconv -f CP1252"),
    "Latin-1": (("K\u00e4se " * 9).encode("latin1"), "iconv -f CP1252"),
    "Shift-JIS": (("\u3042\u306e\u3001" * 9).encode("shift-jis"), "iconv -f ENCODING"),
    "KOI8-R": (("\u0414\u0430 " * 9).encode("koi8-r"), "iconv -f ENCODING"),
    "zip": (b"PK\x03\x04" + bytes(99), "a zip archive"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3", "a PDF"),
    "program": (b"\x7fELF\x02\x01" + bytes(500), "NUL bytes"),
    "gzip": (gzip.compress(b"A"), "end in .gz"),
    "zstandard": (zstandard.compress(b"A"), "end in .zst"),
    "bzip2": (bz2.compress(b"A"), "end in .bz2"),
    "xz": (lzma.compress(b"A"), "end in .xz"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_file_of_another_kind_is_recognized(kind):
    raw, message = OTHER_KINDS[kind]
    with pytest.raises(UserError) as error:
        decode_whole(raw, size=5000)
    assert str(error.value).startswith("a.txt: ")
    assert message in str(error.value)
