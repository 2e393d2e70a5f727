"""Decode the bytes of a text file, or say what the file is instead."""

import codecs
import io
import itertools
from collections.abc import Iterable, Iterator

from charlstm.errors import UserError

HEAD_BYTES = 2**12  # of a file, which show what it is
COMPRESSIONS = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"\xfd7zXZ\x00": ".xz",
} | {b"BZh%d1AY&SY" % level: ".bz2" for level in range(1, 10)}
_OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive, as .docx, .odt and .epub are, too",
    b"%PDF-": "a PDF",
    b"{\\rtf": "an RTF document",
    b"\xd0\xcf\x11\xe0": "an old Word document",
    b"Rar!\x1a": "a RAR archive",
    b"7z\xbc\xaf": "a 7z archive",
}


def decode(blocks: Iterable[bytes], name: str) -> Iterator[str]:
    """Yield the characters of a UTF-8 file without byte-order mark, all line ends as newlines.

    A file with the byte-order mark of UTF-16 is decoded as UTF-16.

    Args:
      blocks: the file, cut anywhere.
      name: the file, for errors.

    Raises:
      UserError: naming the first byte that cannot be decoded and its offset, or what the file is
        if it is no text.
    """
    blocks, head = iter(blocks), b""
    while len(head) < HEAD_BYTES and (piece := next(blocks, b"")):
        head += piece
    is_utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if not is_utf16:
        refuse_other_kinds(head[:HEAD_BYTES], name)
    decoder = codecs.getincrementaldecoder("utf-16" if is_utf16 else "utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    num_bytes, is_begun = 0, is_utf16  # its decoder drops the mark
    whole: Iterable[bytes | None] = itertools.chain([head], blocks, [None])
    for block in whole:
        kept = len(decoder.getstate()[0])  # the bytes of a character that is not complete
        try:
            text = decoder.decode(block or b"", final=block is None)
        except UnicodeDecodeError as error:
            offset = num_bytes - kept + error.start
            advice = "the file is damaged" if is_utf16 else _conversion(error.object)
            raise UserError(
                f"{name}: not UTF-{16 if is_utf16 else 8} (byte 0x{error.object[error.start]:02x} "
                f"at offset {offset}); {advice}"
            ) from None
        num_bytes += len(block or b"")
        if text and not is_begun:
            # Not by 'utf-8-sig', whose errors count from behind the byte-order mark.
            text, is_begun = text.removeprefix("\ufeff"), True
        if text := newlines.decode(text, final=block is None):
            yield text


def compression_of(head: bytes) -> str:
    """Return the file ending of the compression that begins with `head`, '' for none."""
    return next((end for magic, end in COMPRESSIONS.items() if head.startswith(magic)), "")


def refuse_other_kinds(head: bytes, name: str) -> None:
    """Raise UserError if a file that begins with `head` is a known kind that is no UTF-8 text."""
    if ending := compression_of(head):
        raise UserError(f"{name}: is compressed; give it a name that ends in {ending}")
    for magic, kind in _OTHER_KINDS.items():
        if head.startswith(magic):
            raise UserError(f"{name}: is {kind}; give its text as a plain UTF-8 file")
    num_even, num_odd = head[::2].count(0), head[1::2].count(0)
    # An English text in UTF-16 has a NUL beside nearly every letter.
    if max(num_even, num_odd) > len(head) // 4:
        if min(num_even, num_odd) > len(head) // 20:
            raise UserError(f"{name}: holds NUL bytes; give a UTF-8 text")
        encoding = "UTF-16LE" if num_odd > num_even else "UTF-16BE"
        raise UserError(
            f"{name}: looks like {encoding}; convert it, for example with: "
            f"iconv -f {encoding} -t UTF-8"
        )


def _conversion(raw: bytes) -> str:
    """Return how to convert a file that holds `raw`, which is not UTF-8."""
    num_high = sum(byte >= 0x80 for byte in raw[:HEAD_BYTES])
    try:
        raw.decode("cp1252")
        # In Western languages most letters are ASCII.
        is_western = 3 * num_high <= len(raw[:HEAD_BYTES])
    except UnicodeDecodeError:
        is_western = False
    if is_western:
        return "convert it, for example with: iconv -f CP1252 -t UTF-8"
    return "convert it with iconv -f ENCODING -t UTF-8, ENCODING being the one that it is in"
