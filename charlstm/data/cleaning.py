"""Clean the characters of a text as a stream."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from charlstm.data.gutenberg import cut_gutenberg
from charlstm.data.vocab import END, code_points

MAX_WORD_CHARS = 2**17  # one word may be held back


class Cleaning(NamedTuple):
    """What is done to the characters of a text before they become ids."""

    lowercase: bool = False
    strip_punctuation: bool = False  # drops the characters of Unicode's categories P and S
    separator: str = ""  # becomes END, which each file then ends with

    @classmethod
    def from_config(cls, data: ConfigDict) -> "Cleaning":
        """Return the cleaning that `config.data` asks for."""
        # A text's line ends are newlines when the separator is looked for.
        separator = normalize_newlines(data.document_separator)
        return cls(data.lowercase, data.strip_punctuation, separator)

    def apply(
        self, chunks: Iterable[str], tally: Counter[str], is_file: bool = True
    ) -> Iterator[str]:
        """Yield the cleaned characters of a text in chunks, whose borders mean nothing.

        Project Gutenberg's headers, footers and licences are left out.

        Args:
          chunks: the text, cut anywhere, with newlines as line ends.
          tally: counts the `cut` characters of headers, footers and licences, and `separators`.
          is_file: with a separator, END follows the last document.
        """
        chunks = _counted(chunks, tally, "cut", 1)
        chunks = _counted(cut_gutenberg(chunks), tally, "cut", -1)
        if self.separator:
            chunks = replace_separator(chunks, self.separator, tally)
            chunks = end_document(chunks) if is_file else chunks
        if self.lowercase:
            chunks = map(str.lower, break_at_space(chunks))
        if self.strip_punctuation:
            chunks = map(drop_punctuation, chunks)
        return chunks

    def apply_to(self, text: str) -> str:
        """Return a text, such as a prompt, cleaned as the files of a text are."""
        return "".join(self.apply([normalize_newlines(text)], Counter(), is_file=False))


def normalize_newlines(text: str) -> str:
    """Return `text` with newlines for all line ends."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _counted(chunks: Iterable[str], tally: Counter[str], name: str, factor: int) -> Iterator[str]:
    for chunk in chunks:
        tally[name] += factor * len(chunk)
        yield chunk


def replace_separator(chunks: Iterable[str], separator: str, tally: Counter[str]) -> Iterator[str]:
    """Yield a text with END in place of each `separator`."""
    held = ""
    for chunk in chunks:
        *documents, held = (held + chunk).split(separator)
        tally["separators"] += len(documents)
        # What is held may be the beginning of a separator.
        cut = max(0, len(held) - len(separator) + 1)
        yield "".join(document + END for document in documents) + held[:cut]
        held = held[cut:]
    yield held


def end_document(chunks: Iterable[str]) -> Iterator[str]:
    """Yield a text with END after it, unless it ends with one or has no characters."""
    last = ""
    for chunk in chunks:
        last = chunk[-1:] or last
        yield chunk
    if last not in ("", END):
        yield END


def break_at_space(chunks: Iterable[str]) -> Iterator[str]:
    """Yield the same text in chunks that end with white space, as long as there is some.

    Then each can be put into lower case alone, though a final sigma depends on its whole word.
    """
    held = ""
    for chunk in chunks:
        held += chunk
        cut = max(held.rfind(" "), held.rfind("\n")) + 1
        if not cut and len(held) > MAX_WORD_CHARS:
            cut = len(held)
        yield held[:cut]
        held = held[cut:]
    yield held


def drop_punctuation(content: str) -> str:
    """Return `content` without the characters of Unicode's categories P and S."""
    codes = code_points(content)
    keep = np.ones(int(codes.max(initial=0)) + 1, dtype=bool)
    for code in np.flatnonzero(np.bincount(codes)).tolist():
        keep[code] = unicodedata.category(chr(code))[0] not in "PS"
    return codes[keep[codes]].astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
