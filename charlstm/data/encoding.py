"""Decode the bytes of a text file, and recognize files of other kinds."""

import codecs
import io
import itertools
from collections.abc import Iterable, Iterator

from charlstm.errors import UserError

HEAD_BYTES = 2**12  # at the beginning of a file, to recognize its kind
COMPRESSIONS = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"\xfd7zXZ\x00": ".xz",
} | {b"BZh%d1AY&SY" % level: ".bz2" for level in range(1, 10)}
_OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive, like .docx, .odt and .epub",
    b"%PDF-": "a PDF",
    b"{\\rtf": "an RTF document",
    b"\xd0\xcf\x11\xe0": "an old Word document",
    b"Rar!\x1a": "a RAR archive",
    b"7z\xbc\xaf": "a 7z archive",
}


def decode(blocks: Iterable[bytes], name: str, head_bytes: int = HEAD_BYTES) -> Iterator[str]:
    """Yield the characters of a UTF-8 file without byte-order mark, with newlines as line ends.

    A file with the byte-order mark of UTF-16 is decoded as UTF-16.

    Args:
      blocks: the file in non-empty blocks, cut anywhere.
      name: the file, for errors.
      head_bytes: the kind of the file is recognized from the blocks with the first `head_bytes`,
        which are held until they are there.

    Raises:
      UserError: naming the first invalid byte and its offset, or the kind of a file that is not
        text.
    """
    blocks, head = iter(blocks), b""
    while len(head) < head_bytes and (block := next(blocks, b"")):
        head += block
    is_utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if not is_utf16:
        refuse_other_kinds(head[:HEAD_BYTES], name)
    decoder = codecs.getincrementaldecoder("utf-16" if is_utf16 else "utf-8-sig")()
    reader = io.IncrementalNewlineDecoder(decoder, translate=True)
    num_bytes = 0
    for block in itertools.chain([head], blocks, [b""]):
        num_bytes += len(block)
        try:
            text = reader.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raw = error.object  # all that is not decoded yet
            offset = num_bytes - len(raw) + error.start
            advice = "the file is damaged" if is_utf16 else _conversion(raw)
            raise UserError(
                f"{name}: not UTF-{16 if is_utf16 else 8} (byte 0x{raw[error.start]:02x} "
                f"at offset {offset}); {advice}"
            ) from None
        if text:
            yield text


def compression_of(head: bytes) -> str:
    """Return the file ending of the compression of a file that begins with `head`, or ''."""
    return next((end for magic, end in COMPRESSIONS.items() if head.startswith(magic)), "")


def refuse_other_kinds(head: bytes, name: str) -> None:
    """Raise UserError if a file that begins with `head` is of a known kind other than UTF-8."""
    if ending := compression_of(head):
        raise UserError(f"{name}: is compressed; decompress it, or rename it to end in {ending}")
    for magic, kind in _OTHER_KINDS.items():
        if head.startswith(magic):
            raise UserError(f"{name}: is {kind}; convert it to a plain UTF-8 file")
    num_even, num_odd = head[::2].count(0), head[1::2].count(0)
    # In UTF-16 nearly every second byte of an English text is NUL.
    if max(num_even, num_odd) > len(head) // 4:
        if min(num_even, num_odd) > len(head) // 20:
            raise UserError(f"{name}: contains NUL bytes; give a UTF-8 text")
        encoding = "UTF-16LE" if num_odd > num_even else "UTF-16BE"
        raise UserError(
            f"{name}: looks like {encoding}; convert it, for example with: "
            f"iconv -f {encoding} -t UTF-8"
        )


def _conversion(raw: bytes) -> str:
    """Return advice on converting a file that contains `raw`, which is not UTF-8."""
    num_high = sum(byte >= 0x80 for byte in raw[:HEAD_BYTES])
    try:
        raw.decode("cp1252")
        # Most letters of Western languages are ASCII.
        is_western = 3 * num_high <= len(raw[:HEAD_BYTES])
    except UnicodeDecodeError:
        is_western = False
    if is_western:
        return "convert it, for example with: iconv -f CP1252 -t UTF-8"
    return "convert it with: iconv -f ENCODING -t UTF-8, where ENCODING is its encoding"
