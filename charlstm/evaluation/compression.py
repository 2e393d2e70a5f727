"""Compress a file with a trained model, to its bytes and back.

The characters that the model knows are coded by charlstm.evaluation.coding. All others are left out
of the coded text and listed beside it as escapes: capitals for a model of lower-case text, a
byte-order mark, single carriage returns, and bytes that are not UTF-8, as Python's surrogates. A
file whose lines all end in CR LF is coded with LF. Nothing is cleaned.

A compressed file has a header, the escapes, compressed by zlib, and the coded characters.
"""

import json
import os
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np

from charlstm.data.vocab import Vocab, code_points
from charlstm.errors import UserError
from charlstm.evaluation import coding
from charlstm.lstm.native_library import cpu_kind
from charlstm.model import CharLSTM
from charlstm.runs.checksums import checksums
from charlstm.runs.folder import Run

MAGIC = b"CLSTM"
VERSION = 1
MAX_CHARS = 2**32 - 1
ENDS_IN_CRLF = 1  # a flag
# Magic, version and a CRC-32 of all that follows it.
HEAD = struct.Struct("<5sBI")
FIELDS = struct.Struct("<IIIIIBB")  # those of Header


class Header(NamedTuple):
    """What is known of a compressed file before it is decoded."""

    weights: int  # CRC-32 of the run, see weights_crc
    original: int  # CRC-32 of the original bytes
    machine: int  # CRC-32 of the kind of machine
    num_coded: int  # characters
    num_escape_bytes: int
    flags: int
    num_version_bytes: int  # of the versions, which follow the header


class Split(NamedTuple):
    """A text as the ids of known characters, and the other characters as escapes."""

    ids_M: np.ndarray
    escapes: bytes
    num_chars: int  # known or not; CR LF is one where all lines end in it
    flags: int


class Compressed(NamedTuple):
    """A compressed file and what it consists of."""

    raw: bytes
    num_chars: int
    num_escape_bytes: int
    num_coded: int  # characters that the model has predicted
    nats: float  # of these characters
    num_parts: int

    def __str__(self) -> str:
        """Return the size, the bits per character and the share of the escapes."""
        lines = [f"{len(self.raw):,} bytes"]
        if self.num_chars:
            bits = 8 * len(self.raw) / self.num_chars
            lines.append(f"size: {bits:.4f} bits per character, of {self.num_chars:,}")
        if self.num_coded:
            bits = self.nats / np.log(2) / self.num_coded
            lines.append(
                f"evaluated: {bits:.4f} bits per character, of {self.num_coded:,} that the run "
                f"knows, read in {self.num_parts:,} part(s)"
            )
        if unknown := self.num_chars - self.num_coded:
            share = unknown / self.num_chars
            lines.append(f"unknown: {share:.2%} of the characters, {self.num_escape_bytes:,} bytes")
        return "\n".join(lines)


def split_text(raw: bytes, vocab: Vocab) -> Split:
    """Return the characters of a file, UTF-8 or not, as known and other ones."""
    text, flags = raw.decode("utf-8", "surrogateescape"), 0
    plain = text.replace("\r\n", "\n")
    if plain != text and plain.replace("\n", "\r\n") == text:
        text, flags = plain, ENDS_IN_CRLF
    codes_M = code_points(text)
    is_known_M = np.isin(codes_M, [ord(char) for char in vocab])
    places = np.flatnonzero(~is_known_M)
    escapes = b""
    if len(places):
        # The number of known characters before each escape since the one before.
        gaps = np.diff(places - np.arange(len(places)), prepend=0)
        # All first bytes, then all second bytes, and so on, since most of them are alike.
        numbers = np.stack([gaps, codes_M[places]]).astype("<u4").view(np.uint8)
        escapes = zlib.compress(numbers.reshape(2, -1, 4).transpose(0, 2, 1).tobytes(), 9)
    return Split(vocab.encode(text, "drop"), escapes, len(text), flags)


def join_text(ids_M: np.ndarray, escapes: bytes, flags: int, vocab: Vocab) -> bytes:
    """Return the bytes of the file that split_text has split."""
    codes_M = code_points(vocab.decode(ids_M)).astype("<u4")
    if escapes:
        numbers = np.frombuffer(zlib.decompress(escapes), np.uint8).reshape(2, 4, -1)
        gaps, others = np.ascontiguousarray(numbers.transpose(0, 2, 1)).view("<u4")[..., 0]
        codes_M = np.insert(codes_M, np.cumsum(gaps.astype(np.int64)), others)
    text = codes_M.tobytes().decode("utf-32-le", "surrogatepass")
    text = text.replace("\n", "\r\n") if flags & ENDS_IN_CRLF else text
    return text.encode("utf-8", "surrogateescape")


def compress(
    run: Run, model: CharLSTM, params: Any, raw: bytes, advance: Callable[[int], Any] = int
) -> Compressed:
    """Return the compressed form of the bytes of a file.

    Args:
      run, model, params: as load_model returns them.
      raw: any bytes; the better the run knows such text, the fewer come out.
      advance: called with numbers of characters that have been coded.

    Raises:
      UserError: if there are too many characters, or constriction is not installed.
      RunError: if a probability is not finite.
    """
    if len(raw) > MAX_CHARS:
        raise UserError(f"the file has {len(raw):,} bytes, more than {MAX_CHARS:,}; cut it")
    ids_M, escapes, num_chars, flags = split_text(raw, run.vocab)
    coded = coding.encode(model, params, ids_M, advance)
    versions = _versions().encode()
    numbers = weights_crc(run, params), zlib.crc32(raw), _machine_crc(), len(ids_M), len(escapes)
    body = FIELDS.pack(*numbers, flags, len(versions)) + versions + escapes + coded.raw
    content = HEAD.pack(MAGIC, VERSION, zlib.crc32(body)) + body
    return Compressed(content, num_chars, len(escapes), len(ids_M), coded.nats, coded.num_parts)


def decompress(
    run: Run,
    model: CharLSTM,
    params: Any,
    content: bytes,
    name: str,
    advance: Callable[[int], Any] = int,
) -> bytes:
    """Return the bytes that `compress` compressed.

    Args:
      run, model, params: those of `compress`.
      content: the compressed file.
      name: its name, for errors.
      advance: called with numbers of characters that have been decoded.

    Raises:
      UserError: if the file is no compressed one, damaged, of a newer version or of other weights,
        or if this machine gives other probabilities than the one that wrote it.
    """
    header, rest = read_header(content, name)
    if header.weights != weights_crc(run, params):
        raise UserError(
            f"{name}: was written with other weights than these of {run.workdir}; give --workdir "
            "and --checkpoint of its run, as they were then"
        )
    begin = header.num_version_bytes
    end = begin + header.num_escape_bytes
    ids_M = coding.decode(model, params, rest[end:], header.num_coded, advance)
    if ids_M is not None:
        raw = join_text(ids_M, rest[begin:end], header.flags, run.vocab)
        if zlib.crc32(raw) == header.original:
            return raw
    where = "this machine" if header.machine == _machine_crc() else "another kind of machine"
    raise UserError(
        f"{name}: the probabilities here are not those that it was written with, by "
        f"{rest[:begin].decode()} on {where}; decompress it with these versions, on the machine "
        "that wrote it"
    )


def read_header(content: bytes, name: str) -> tuple[Header, bytes]:
    """Return the header of a compressed file, and what follows it.

    Raises:
      UserError: if the file is none, is damaged, or has a newer version.
    """
    if not content.startswith(MAGIC):
        raise UserError(f"{name}: is no file of launch/compress.py; compress it first")
    _, version, crc = HEAD.unpack_from(content.ljust(HEAD.size, b"\0"))
    if version > VERSION:
        raise UserError(
            f"{name}: is of version {version}, newer than {VERSION}; use a newer charlstm"
        )
    body = content[HEAD.size :]
    if len(body) < FIELDS.size or zlib.crc32(body) != crc:
        raise UserError(f"{name}: is damaged or cut off; copy it again")
    return Header(*FIELDS.unpack_from(body)), body[FIELDS.size :]


def weights_crc(run: Run, params: Any) -> int:
    """Return a CRC-32 of all that the probabilities of a run depend on."""
    settings = run.config.model.to_dict() | {"recurrence": ""}
    about = [checksums(params), settings, run.config.data.document_separator, run.vocab.characters]
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _versions() -> str:
    return f"jax {jax.__version__} jaxlib {jaxlib.__version__}"


def _machine_crc() -> int:
    """Return a CRC-32 of the kind and number of processors, which may change how sums round."""
    available = getattr(os, "sched_getaffinity", None)
    cores = len(available(0)) if available else os.cpu_count()
    return zlib.crc32(f"{cpu_kind()!r} {cores} {jax.devices()[0].device_kind}".encode())
