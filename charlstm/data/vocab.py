"""The characters of a text and their integer ids."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from charlstm.checks import check_choice, check_ids
from charlstm.errors import ArgumentError

END = "\x03"  # Unicode's END OF TEXT marks the end of a document
UNKNOWN = "\ufffd"  # REPLACEMENT CHARACTER: replaces characters that occur too rarely
NUM_CODES = 0x110000


def count_characters(chunks: Iterable[str]) -> np.ndarray:
    """Return the number of occurrences of each Unicode code point, indexed by code point."""
    counts = np.zeros(NUM_CODES, dtype=np.int64)
    for chunk in chunks:
        chunk_counts = np.bincount(code_points(chunk))
        counts[: len(chunk_counts)] += chunk_counts
    return counts


class Vocab:
    """The distinct characters of a text in order of code point; the id of each is its index.

    Vocabularies with the same characters are equal. Iteration yields the characters.
    """

    def __init__(self, characters: Sequence[str]):
        """Store single characters.

        Raises:
          ValueError: if `characters` is empty or not in strictly ascending order of code point.
        """
        self.characters = tuple(characters)
        codes = np.array([ord(character) for character in self.characters], dtype=np.int64)
        if len(codes) == 0 or np.any(np.diff(codes) <= 0):
            raise ValueError(
                "characters: must be distinct, in ascending order of code point, and at least one"
            )
        self.dtype = np.min_scalar_type(len(codes) - 1)
        self._codes = codes
        # With one entry per code point, encoding is a single gather.
        self._id_of_code = np.full(max(int(codes[-1]) + 2, 256), -1, dtype=np.int32)
        self._id_of_code[codes] = np.arange(len(codes))

    @classmethod
    def from_text(cls, content: str) -> "Vocab":
        """Return the vocabulary of `content`.

        Raises:
          ArgumentError: if `content` has fewer than two distinct characters.
        """
        return cls.from_counts(count_characters([content]))

    @classmethod
    def from_counts(cls, counts: np.ndarray, min_count: int = 1) -> "Vocab":
        """Return the vocabulary of a text from the counts that count_characters returns.

        Characters that occur fewer than `min_count` times, except END, are replaced by UNKNOWN.

        Raises:
          ArgumentError: if fewer than two distinct characters remain.
        """
        codes = np.flatnonzero(counts)
        is_rare = (counts[codes] < min_count) & (codes != ord(END))
        frequent = set(codes[~is_rare].tolist()) | ({ord(UNKNOWN)} if is_rare.any() else set())
        if len(frequent) < 2:
            lower = f", or lower min_count={min_count}" if is_rare.any() else ""
            raise ArgumentError(
                f"the text has {len(frequent)} distinct character(s), nothing to predict; "
                f"give a text with at least 2{lower}"
            )
        return cls([chr(code) for code in sorted(frequent)])

    def __len__(self) -> int:
        return len(self.characters)

    def __iter__(self) -> Iterator[str]:
        return iter(self.characters)

    def __contains__(self, character: object) -> bool:
        return character in self.characters

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocab) and self.characters == other.characters

    def __hash__(self) -> int:
        return hash(self.characters)

    def __repr__(self) -> str:
        if len(self) <= 100:
            return f"Vocab({''.join(self)!r})"
        return f"<Vocab of {len(self)} characters, {''.join(self.characters[:100])!r} ...>"

    def encode(self, content: str, unknown: str = "error", start: int = 0) -> np.ndarray:
        """Return ids_M of `content` in the smallest unsigned integer type for V ids.

        Args:
          content: any text.
          unknown: what to do with characters outside the vocabulary: 'error', 'drop', or
            'replace' (by UNKNOWN, else a space, else the first character of the vocabulary).
          start: position of `content` in the whole text, for errors.

        Raises:
          ArgumentError: naming the first unknown character and its position, if unknown='error'.
          ValueError: for another value of `unknown`.
        """
        check_choice("unknown", unknown, ("error", "drop", "replace"))
        codes = code_points(content)
        if codes.dtype != np.uint8:
            codes = np.minimum(codes, len(self._id_of_code) - 1)
        ids = self._id_of_code.take(codes)
        if ids.min(initial=0) < 0:
            is_unknown = ids < 0
            if unknown == "error":
                index = int(np.argmax(is_unknown))
                raise ArgumentError(
                    f"character {content[index]!r} (U+{ord(content[index]):04X}) at position "
                    f"{start + index} is not among the {len(self)} characters of this model; "
                    "leave it out, or set unknown to drop or replace"
                )
            if unknown == "drop":
                ids = ids[~is_unknown]
            else:
                ids[is_unknown] = self._replacement()
        return ids.astype(self.dtype)

    def _replacement(self) -> int:
        known = [char for char in (UNKNOWN, " ") if char in self]
        return self.characters.index(known[0]) if known else 0

    def decode(self, ids: Any) -> str:
        """Return the text of ids_M, an array of any integer type.

        Raises:
          ValueError: if `ids` does not have one axis, or contains an id outside 0 to V - 1.
        """
        if np.size(ids) == 0:
            return ""
        check_ids("ids", ids, len(self), ndim=1)
        codes = self._codes[np.asarray(ids)].astype("<u4")
        return codes.tobytes().decode("utf-32-le", "surrogatepass")

    def utf8_bytes(self) -> np.ndarray:
        """Return bytes_V, the size of each character in UTF-8."""
        return 1 + np.searchsorted([0x80, 0x800, 0x10000], self._codes, side="right")

    def to_json(self) -> str:
        """Return the characters as a JSON list, id by id."""
        return json.dumps(self.characters, ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> "Vocab":
        """Return the vocabulary from the output of to_json."""
        return cls(json.loads(text))


def code_points(content: str) -> np.ndarray:
    """Return the code point of each character, as uint8 for ASCII and uint32 otherwise."""
    if content.isascii():
        return np.frombuffer(content.encode(), dtype=np.uint8)
    # A command line, unlike a UTF-8 file, can contain lone surrogates.
    return np.frombuffer(content.encode("utf-32-le", "surrogatepass"), dtype="<u4")
