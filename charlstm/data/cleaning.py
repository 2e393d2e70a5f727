"""Clean the characters of a text as a stream."""

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from charlstm.data.gutenberg import cut_gutenberg
from charlstm.data.vocab import END, code_points

MAX_WORD_CHARS = 2**17  # of a word that is buffered


@dataclass
class CleaningStats:
    """What cleaning removes from a text and replaces in it."""

    num_cut: int = 0  # characters of Project Gutenberg's headers, footers and licences
    num_separators: int = 0


class Cleaning(NamedTuple):
    """How the characters of a text are cleaned before they become ids."""

    lowercase: bool = False
    strip_punctuation: bool = False  # removes the Unicode categories P and S
    separator: str = ""  # is replaced by END, which then also ends each file

    @classmethod
    def from_config(cls, data: ConfigDict) -> "Cleaning":
        """Return the cleaning that `config.data` asks for."""
        # The separator is searched in text whose line ends are newlines.
        separator = normalize_newlines(data.document_separator)
        return cls(data.lowercase, data.strip_punctuation, separator)

    def apply(
        self,
        chunks: Iterable[str],
        stats: CleaningStats | None = None,
        is_file: bool = True,
        has_frames: bool = True,
    ) -> Iterator[str]:
        """Yield the cleaned characters of a text in chunks, without Project Gutenberg's frames.

        The result does not depend on where the chunks end.

        Args:
          chunks: the text, cut anywhere, with newlines as line ends.
          stats: is updated while the text is read.
          is_file: with a separator, add END after the last document.
          has_frames: search for Project Gutenberg's frames, which holds back MAX_FRAME_CHARS
            characters.
        """
        stats = stats or CleaningStats()
        if has_frames:
            chunks = _count_cut(chunks, stats, 1)
            chunks = _count_cut(cut_gutenberg(chunks), stats, -1)
        if self.separator:
            chunks = replace_separator(chunks, self.separator, stats)
            chunks = end_document(chunks) if is_file else chunks
        if self.lowercase:
            chunks = map(str.lower, break_at_space(chunks))
        if self.strip_punctuation:
            chunks = map(drop_punctuation, chunks)
        return iter(chunks)

    def apply_to(self, text: str, stats: CleaningStats | None = None) -> str:
        """Clean a short text, such as a prompt, as the files of a text are cleaned."""
        return "".join(self.apply([normalize_newlines(text)], stats, is_file=False))


def normalize_newlines(text: str) -> str:
    """Return `text` with newlines for all line ends."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _count_cut(chunks: Iterable[str], stats: CleaningStats, sign: int) -> Iterator[str]:
    for chunk in chunks:
        stats.num_cut += sign * len(chunk)
        yield chunk


def replace_separator(chunks: Iterable[str], separator: str, stats: CleaningStats) -> Iterator[str]:
    """Yield a text with END in place of each `separator`."""
    buffer = ""
    for chunk in chunks:
        *documents, buffer = (buffer + chunk).split(separator)
        stats.num_separators += len(documents)
        # The end of the buffer may be the beginning of a separator.
        cut = max(0, len(buffer) - len(separator) + 1)
        yield "".join(document + END for document in documents) + buffer[:cut]
        buffer = buffer[cut:]
    yield buffer


def end_document(chunks: Iterable[str]) -> Iterator[str]:
    """Yield a text followed by END, unless it is empty or already ends with END."""
    last = ""
    for chunk in chunks:
        last = chunk[-1:] or last
        yield chunk
    if last not in ("", END):
        yield END


def break_at_space(chunks: Iterable[str]) -> Iterator[str]:
    """Yield the same text in chunks that end with white space, except after very long words.

    Each chunk can be lower-cased alone, because the form of a final sigma depends on its word only.
    """
    buffer = ""
    for chunk in chunks:
        buffer += chunk
        cut = max(buffer.rfind(" "), buffer.rfind("\n")) + 1
        if not cut and len(buffer) > MAX_WORD_CHARS:
            cut = len(buffer)
        yield buffer[:cut]
        buffer = buffer[cut:]
    yield buffer


def drop_punctuation(text: str) -> str:
    """Return `text` without the characters of Unicode's categories P and S."""
    codes = code_points(text)
    keep = np.ones(int(codes.max(initial=0)) + 1, dtype=bool)
    for code in np.flatnonzero(np.bincount(codes)).tolist():
        keep[code] = unicodedata.category(chr(code))[0] not in "PS"
    return codes[keep[codes]].astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
