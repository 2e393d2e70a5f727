"""Score texts as streams: predict their characters, and sum up their surprise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from charlstm.data.cleaning import CleaningStats
from charlstm.data.encoding import decode
from charlstm.data.passes import log_cut, read_characters
from charlstm.data.sources import Source, find_source
from charlstm.data.vocab import code_points
from charlstm.errors import ArgumentError, RunError, UserError
from charlstm.evaluation.surprise import CHUNK_LEN, predict_pieces
from charlstm.evaluation.units import Piece
from charlstm.model import CharLSTM
from charlstm.runs.folder import Run

STANDARD_INPUT = "-"
NUM_TOP = 5  # characters at each place, where they are shown
PIECE_LEN = 8 * CHUNK_LEN  # characters that are predicted before the first of them is shown
BLOCK_BYTES = 2**16  # of one read of standard input at most
MAX_BITS = 1000  # per character; 2 to the power of more is no float64
REMEDY = "give UTF-8 texts, or - for the standard input"


@dataclass
class Totals:
    """Sums over the predicted characters of a text."""

    num_chars: int = 0
    bits: float = 0.0
    num_bytes: int | None = 0  # in UTF-8; None if the model reads other characters than the text's

    def add(self, num_chars: int, bits: float, num_bytes: int | None) -> None:
        """Add the sums over more characters."""
        self.num_chars += num_chars
        self.bits += bits
        is_known = self.num_bytes is not None and num_bytes is not None
        self.num_bytes = self.num_bytes + num_bytes if is_known else None  # type: ignore[operator]

    def metrics(self) -> dict[str, Any]:
        """Return the sums and the means, with `bits_per_byte` None if the bytes are unknown."""
        bits_per_char = self.bits / self.num_chars
        return {
            "characters": self.num_chars,
            "bits": self.bits,
            "bits_per_char": bits_per_char,
            "bits_per_byte": self.bits / self.num_bytes if self.num_bytes else None,
            "perplexity": 2.0**bits_per_char,
        }


class Scored(NamedTuple):
    """A text that is predicted while `pieces` is iterated over, which completes `totals`."""

    name: str
    pieces: Iterator[Piece]
    totals: Totals


def find_texts(paths: Sequence[str]) -> list[Source | None]:
    """Return the files of `paths`, one Source each, and None for the standard input.

    Args:
      paths: files, folders, patterns, or STANDARD_INPUT.

    Raises:
      UserError: if a path has no file, or STANDARD_INPUT occurs twice.
    """
    if paths.count(STANDARD_INPUT) > 1:
        raise UserError("-: the standard input can be read once; give one -")
    found = list[Source | None]()
    for path in paths:
        if not path:
            raise UserError(f"'': is no path; {REMEDY}")
        if path == STANDARD_INPUT:
            found.append(None)
        else:
            source = find_source(path, remedy=REMEDY)
            found += [Source(file.path, [file]) for file in source.files]
    return found


def score_texts(
    run: Run,
    model: CharLSTM,
    params: Any,
    sources: Sequence[Source | None],
    stdin: BinaryIO,
    *,
    unknown: str = "error",
    num_top: int = 1,
) -> Iterator[Scored]:
    """Yield each text, read from an empty state, in memory that does not depend on its length.

    A file is read in steps of PIECE_LEN characters, and `stdin` as far as it has been written. Its
    characters are cleaned as those of the run's text, but in `stdin` headers of Project Gutenberg
    stay, because finding them needs characters that may come much later. A run on windows predicts
    each character from the last config.seq_len characters.

    Args:
      run, model, params: as load_model returns them.
      sources: as find_texts returns them.
      stdin: the standard input, unbuffered.
      unknown: what to do with characters outside the vocabulary: 'error', 'drop' or 'replace'.
      num_top: K of the predictions.

    Raises, while the pieces are iterated over:
      UserError: if a text cannot be read, has an unknown character or nothing to predict.
      RunError: if the surprise of a character is not finite.
    """
    for source in sources:
        totals, name = Totals(), source.path if source else STANDARD_INPUT
        chunks = _read_file(source, run) if source else _read_stream(stdin, run)
        pieces = _predict(run, model, params, name, chunks, totals, unknown, num_top)
        yield Scored(name, pieces, totals)


def _read_file(source: Source, run: Run) -> Iterator[str]:
    """Yield the cleaned characters of a file."""
    stats, num_left = CleaningStats(), 0
    for chunk in read_characters(source, run.cleaning, stats):
        num_left += len(chunk)
        yield chunk
    log_cut(source.path, stats.num_cut, num_left)


def _read_stream(stdin: BinaryIO, run: Run) -> Iterator[str]:
    """Yield the cleaned characters of a stream, as soon as they are there."""

    def blocks() -> Iterator[bytes]:
        try:
            while block := stdin.read(BLOCK_BYTES):
                yield block
        except OSError as error:  # for example a folder
            raise UserError(f"-: cannot be read ({error.strerror or error}); {REMEDY}") from None

    yield from run.cleaning.apply(decode(blocks(), "-", head_bytes=1), has_frames=False)


def _predict(
    run: Run,
    model: CharLSTM,
    params: Any,
    name: str,
    chunks: Iterator[str],
    totals: Totals,
    unknown: str,
    num_top: int,
) -> Iterator[Piece]:
    """Yield the pieces of a text, and add them to `totals`."""
    bytes_V = None if any(run.cleaning) else run.vocab.utf8_bytes()
    read = list[tuple[np.ndarray, bool]]()  # one at most: (ids, whether they are the text's own)

    def encode() -> Iterator[np.ndarray]:
        start = 0
        for chunk in _at_most(chunks, PIECE_LEN):
            try:
                ids_M = run.vocab.encode(chunk, unknown, start)
            except ArgumentError as error:
                raise UserError(f"{name}: {error}") from None
            start += len(chunk)
            is_own = np.array_equal(code_points(run.vocab.decode(ids_M)), code_points(chunk))
            read.append((ids_M, is_own))
            yield ids_M

    num_known = 0
    window = run.config.seq_len if run.config.data.order == "windows" else None
    for predictions in predict_pieces(model, params, encode(), num_top, window):
        ids_M, is_own = read.pop()
        is_predicted_M = predictions.rank_M > 0
        bits = float(np.sum(predictions.bits_M[is_predicted_M], dtype=np.float64))
        if not bits <= MAX_BITS * len(ids_M):
            raise RunError(
                f"{name}: the bits per character are {bits / len(ids_M):.3g}, thus the weights are "
                "useless; try another --checkpoint"
            )
        num_bytes = None
        if bytes_V is not None and is_own:
            num_bytes = int(bytes_V[ids_M[is_predicted_M]].sum())
        totals.add(int(is_predicted_M.sum()), bits, num_bytes)
        num_known += len(ids_M)
        yield Piece(run.vocab.decode(ids_M), predictions)
    if not totals.num_chars:
        raise UserError(
            f"{name}: has {num_known} character(s) that the model knows, too few to predict one; "
            f"give a text of at least {1 + (window or 1)}"
        )


def _at_most(chunks: Iterator[str], length: int) -> Iterator[str]:
    """Yield the same text in chunks of at most `length` characters."""
    for chunk in chunks:
        for begin in range(0, len(chunk), length):
            yield chunk[begin : begin + length]
