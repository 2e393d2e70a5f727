"""Report known words and verbatim copies in generated text."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence, Set

import numpy as np

from charlstm.data.batches import split
from charlstm.data.vocab import Vocab
from charlstm.evaluation.memorization import (
    copied_spans,
    import_pydivsufsort,
    known_words,
    match_lengths,
    whole_words,
    words,
)
from charlstm.runs.folder import Run
from charlstm.training.setup import open_run_text

logger = logging.getLogger(__name__)

LONG_SPAN = 40  # characters, longer than phrases that two writers share by chance
NUM_UNKNOWN = 5
DECODED = 2**20  # characters of a training text decoded at once


def open_training_part(run: Run, flag: str) -> np.ndarray:
    """Return ids_M of the training part of the text of `run`, which `flag` needs.

    Raises:
      UserError: if its text cannot be read or has changed.
    """
    text = open_run_text(run, f"bring it back, or omit {flag}")
    return split(text.ids_M, run.config.data)[0]


def open_known_text(run: Run) -> np.ndarray:
    """Return ids_M of the training part for --check.

    Raises:
      UserError: as open_training_part does, or if a package that finds copies is missing.
    """
    import_pydivsufsort()
    return open_training_part(run, "--check")


def log_report(texts: Sequence[np.ndarray], train_M: np.ndarray, vocab: Vocab, listed: str) -> None:
    """Log the report on `texts`; `listed` is a text of additional known words."""
    for line in report(texts, train_M, vocab, set(words(listed))):
        logger.info(line)


def report(
    texts: Sequence[np.ndarray], train_M: np.ndarray, vocab: Vocab, listed: Set[str]
) -> Iterator[str]:
    """Yield the lines of a report on words and copies.

    Args:
      texts: ids_L of each generated text.
      train_M: the training text.
      vocab: the vocabulary of both.
      listed: additional known words.
    """
    num_chars = sum(map(len, texts))
    yield f"comparing {num_chars:,} characters with {len(train_M):,} of the training text"
    chunks = (
        vocab.decode(train_M[start : start + DECODED]) for start in range(0, len(train_M), DECODED)
    )
    decoded = [vocab.decode(ids_L) for ids_L in texts]
    yield from format_words(decoded, known_words(chunks), listed)
    yield from format_copies(decoded, match_lengths(texts, train_M, len(vocab)))


def format_words(texts: Sequence[str], known: Set[str], listed: Set[str]) -> Iterator[str]:
    """Yield lines on the number of words, the share of known words and the unknown ones."""
    found = [word for text in texts for word in whole_words(text)]
    if not found:
        yield "words: none"
        return
    unknown = Counter(word for word in found if word not in known)
    share = 1 - unknown.total() / len(found)
    yield f"words: {len(found):,}; {share:.1%} occur in the training text"
    if listed:
        unknown = Counter({word: unknown[word] for word in unknown if word not in listed})
        share = 1 - unknown.total() / len(found)
        yield f"words: {share:.1%} occur there or in the word list"
    if unknown:
        most = (f"{quoted(word)} ({count})" for word, count in unknown.most_common(NUM_UNKNOWN))
        yield f"unknown words: {unknown.total():,}, most often {', '.join(most)}"


def format_copies(texts: Sequence[str], lengths: Sequence[np.ndarray]) -> Iterator[str]:
    """Yield lines on copied spans, given match_lengths."""
    index = max(range(len(texts)), key=lambda index: lengths[index].max(initial=0))
    text, lengths_L = texts[index], lengths[index]
    longest = int(lengths_L.max(initial=0))
    if not longest:
        yield "longest copied span: none"
        return
    start = int(lengths_L.argmax())
    yield (f"longest copied span: {longest:,} characters, {quoted(text[start : start + longest])}")
    num_spans = sum(len(copied_spans(lengths_L, LONG_SPAN + 1)) for lengths_L in lengths)
    per_10000 = 1e4 * num_spans / sum(map(len, texts))
    yield (
        f"copied spans of more than {LONG_SPAN} characters: {num_spans:,}, "
        f"{per_10000:.2f} per 10,000 characters"
    )


def quoted(text: str) -> str:
    """Return `text` in quotes, without its middle if it is long."""
    return repr(text) if len(text) <= 90 else f"{text[:50]!r} ... {text[-30:]!r}"
