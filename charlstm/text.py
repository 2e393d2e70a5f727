"""Text in: where it comes from, how it is cleaned, and which integer each character gets."""

import hashlib
import json
import logging
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pooch
from etils import epath

from charlstm.errors import UserError

logger = logging.getLogger(__name__)

DRACULA_URLS = (
    "https://www.gutenberg.org/cache/epub/345/pg345.txt",
    "https://www.gutenberg.org/files/345/345-0.txt",
    "https://gutenberg.pglaf.org/cache/epub/345/pg345.txt",
    "https://aleph.pglaf.org/cache/epub/345/pg345.txt",
)
PYTHON_MANUAL = "pydoc_data.topics"
END = "\x03"  # Unicode's END OF TEXT: the end of a document, where there are documents
UNKNOWN = "\ufffd"  # REPLACEMENT CHARACTER: what characters too rare to be learnt fold into

# New editions frame the book in '***' lines; those before 2004 end their preface in '*END*'.
_GUTENBERG_START = re.compile(
    r"^\*{3}[ \t]*START OF (?:THE|THIS) PROJECT GUTENBERG E(?:BOOK|TEXT)[^*]{0,300}\*{3}[ \t]*$"
    r"|^\*END[* ]+THE SMALL PRINT![^\n]*\*END\*[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
_GUTENBERG_END = re.compile(
    r"^(?:\*{3}[ \t]*)?END OF (?:THE |THIS )?PROJECT GUTENBERG\b",
    re.IGNORECASE | re.MULTILINE,
)


class Text(NamedTuple):
    """A cleaned text and its origin: `source` is a path or PYTHON_MANUAL."""

    content: str
    source: str
    sha256: str  # of the bytes as read, so that sha256sum on the file gives the same
    num_bytes: int
    num_cut: int  # characters of Project Gutenberg's header and licence left out


def load_text(
    path: str = "",
    *,
    lowercase: bool = False,
    strip_punctuation: bool = False,
    source: str = "",
    remedy: str = "give a UTF-8 text file in config.data.path",
) -> Text:
    """Read and clean a UTF-8 text.

    Byte-order mark, carriage returns and Project Gutenberg's header and licence are left out.

    Args:
      path: the file to read; empty means Dracula, downloaded once, or else Python's own manual.
      lowercase: turn the text into lower case.
      strip_punctuation: drop the characters of Unicode's categories P and S.
      source: what an earlier run read; PYTHON_MANUAL keeps it from taking Dracula instead.
      remedy: what the error of a text that can't be had tells to do.

    Raises:
      UserError: if the text is missing, unreadable, a folder, empty or not UTF-8.
    """
    if not path and source != PYTHON_MANUAL:
        path = _fetch_dracula()
    raw = _read_bytes(path, remedy) if path else _python_manual()
    content = _decode(raw, path).replace("\r\n", "\n").replace("\r", "\n")
    content, num_cut = cut_gutenberg(content)
    if lowercase:
        content = content.lower()
    if strip_punctuation:
        content = drop_punctuation(content)
    if not content.strip():
        raise UserError(f"{path}: the text is empty; {remedy}")
    return Text(
        content=content,
        source=os.fspath(epath.Path(path).resolve()) if path else PYTHON_MANUAL,
        sha256=hashlib.sha256(raw).hexdigest(),
        num_bytes=len(raw),
        num_cut=num_cut,
    )


def cut_gutenberg(content: str) -> tuple[str, int]:
    """Return `content` without Project Gutenberg's frame, and how many characters that was."""
    start = _GUTENBERG_START.search(content)
    begin = start.end() if start else 0
    end = _GUTENBERG_END.search(content, begin)
    if not start and not end:
        return content, 0
    book = content[begin : end.start() if end else len(content)].strip("\n") + "\n"
    return book, len(content) - len(book)


def drop_punctuation(content: str) -> str:
    """Return `content` without the characters of Unicode's categories P and S."""
    codes = _code_points(content)
    keep = np.ones(int(codes.max(initial=0)) + 1, dtype=bool)
    for code in _distinct(codes):
        keep[code] = unicodedata.category(chr(code))[0] not in "PS"
    return codes[keep[codes]].tobytes().decode("utf-32-le", "surrogatepass")


class Vocab:
    """The distinct characters of a text in order of code point, each with its index as id."""

    def __init__(self, characters: Sequence[str]):
        self.characters = tuple(characters)
        codes = np.array([ord(character) for character in self.characters], dtype=np.int64)
        if len(codes) == 0 or np.any(np.diff(codes) <= 0):
            raise ValueError("a Vocab needs distinct characters in ascending order")
        self.dtype = np.min_scalar_type(len(codes) - 1)
        self._codes = codes
        # One entry a code point up to the largest: encoding is a single gather.
        self._id_of_code = np.full(int(codes[-1]) + 2, -1, dtype=np.int32)
        self._id_of_code[codes] = np.arange(len(codes))

    @classmethod
    def from_text(cls, content: str) -> "Vocab":
        """Return the vocabulary of `content`.

        Raises:
          UserError: if `content` has fewer than two distinct characters.
        """
        codes = _distinct(_code_points(content))
        if len(codes) < 2:
            raise UserError(
                f"the text has {len(codes)} distinct character(s): there is nothing to predict; "
                "give a text with at least 2"
            )
        return cls([chr(code) for code in codes])

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, content: str, unknown: str = "error") -> np.ndarray:
        """Return the ids of `content` as an array of the smallest unsigned type that holds V.

        Args:
          content: any text.
          unknown: for characters outside the vocabulary, 'error', 'drop', or 'replace' by a
            space (by the first character of the vocabulary where it has no space).

        Raises:
          UserError: naming the first unknown character and its position, if unknown='error'.
        """
        codes = _code_points(content)
        ids = self._id_of_code[np.minimum(codes, len(self._id_of_code) - 1)]
        is_unknown = ids < 0
        if is_unknown.any():
            if unknown == "error":
                position = int(np.argmax(is_unknown))
                raise UserError(
                    f"character {content[position]!r} (U+{ord(content[position]):04X}) at position "
                    f"{position} is not among the {len(self)} characters of this model; "
                    "leave it out, or use --unknown=drop or --unknown=replace"
                )
            if unknown == "drop":
                ids = ids[~is_unknown]
            elif unknown == "replace":
                ids = np.where(
                    is_unknown, self.characters.index(" ") if " " in self.characters else 0, ids
                )
            else:
                raise ValueError(f"unknown={unknown!r}: must be error, drop or replace")
        return ids.astype(self.dtype)

    def decode(self, ids: Any) -> str:
        """Return the text of `ids`, an array of any integer type with axis M."""
        codes = self._codes[np.asarray(ids)].astype("<u4")
        return codes.tobytes().decode("utf-32-le", "surrogatepass")

    def to_json(self) -> str:
        """Return the characters as a JSON list, id by id."""
        return json.dumps(self.characters, ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> "Vocab":
        """Return the vocabulary that to_json wrote."""
        return cls(json.loads(text))


def _code_points(content: str) -> np.ndarray:
    # Lone surrogates can't come from a UTF-8 file, but they can from a command line.
    return np.frombuffer(content.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _distinct(codes: np.ndarray) -> list[int]:
    # A table of flags over all code points takes one pass, where sorting takes many.
    seen = np.zeros(0x110000, dtype=bool)
    seen[codes] = True
    return np.flatnonzero(seen).tolist()


def _read_bytes(path: str, remedy: str) -> bytes:
    try:
        return epath.Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from None


def _decode(raw: bytes, path: str) -> str:
    try:
        # Not by 'utf-8-sig', whose errors count from behind the byte-order mark.
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start}); "
            "convert it, for example with: iconv -f latin1 -t utf-8"
        ) from None


def _python_manual() -> bytes:
    from pydoc_data.topics import topics  # half a megabyte that most runs don't need

    return "\n".join(topics[key] for key in sorted(topics)).encode()


class _DownloadBar:
    """A rich progress bar with the four names that pooch's downloader calls."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import DownloadColumn, Progress

        columns = (*Progress.get_default_columns(), DownloadColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("downloading", total=None)
        self.total = 0

    def update(self, amount: int) -> None:
        self._progress.start()  # at the first byte, so that a dead address shows no bar
        self._progress.update(self._task, advance=amount, total=self.total or None)

    def reset(self) -> None:
        self._progress.reset(self._task)

    def close(self) -> None:
        self._progress.stop()


def _fetch_dracula() -> str:
    """Return the path of Dracula in the user's cache, downloaded if need be; '' if that fails."""
    import requests  # comes with pooch, which raises its errors

    cache = Path(os.environ.get("CHARLSTM_CACHE") or pooch.os_cache("charlstm"))
    target = cache / "pg345.txt"
    if target.exists():
        return str(target)
    reason = ""
    pooch.get_logger().setLevel("ERROR")
    for url in DRACULA_URLS:
        bar = _DownloadBar()
        try:
            # Gutenberg mends its books now and then, so the bytes have no lasting hash.
            pooch.retrieve(
                url,
                known_hash=None,
                fname=target.name,
                path=cache,
                downloader=pooch.HTTPDownloader(progressbar=bar, timeout=5),
            )
        except (requests.RequestException, OSError, ValueError) as error:
            reason = f"{type(error).__name__} from {url}"
            continue
        finally:
            bar.close()
        if b"Dracula" in target.read_bytes()[:2000]:
            return str(target)
        target.unlink()  # a captive portal's page, say
        reason = f"{url} sent something else"
    logger.warning(
        "Dracula could not be downloaded (%s): using the manual that Python carries "
        "(pydoc_data.topics) instead; --config.data.path=FILE takes any text",
        reason,
    )
    return ""
