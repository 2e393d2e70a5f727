"""Generate texts whose entropy rate is known exactly.

No model can have fewer bits per character than the entropy rate, and a good one has few more.
"""

import math
from bisect import bisect
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from charlstm.config import base_config

HELD_OUT_CHARS = 400_000  # so many random characters have a standard error of about 0.1 %


class Source(NamedTuple):
    """A text."""

    name: str
    ids_M: np.ndarray
    vocab_size: int
    entropy_rate: float = math.nan  # bits per character, if known


def known_sources(is_small: bool) -> Iterator[tuple[Source, ConfigDict]]:
    """Yield texts, and configs whose models come within 2 % of the entropy rates."""
    if is_small:  # to learn in seconds, with equal shapes, so that they share compiled programs
        markov = markov_source(1_430_000, num_classes=3, alpha=0.3, vocab_size=6)
        brackets = bracket_source(1_430_000, num_kinds=3, max_depth=5)
        sizes = {"hidden_size": 64, "seq_len": 32, "num_steps": 800}
        yield from ((source, source_config(source, **sizes)) for source in (markov, brackets))
    else:  # long enough to be read about once, so that nothing is memorized
        markov, brackets = markov_source(10_600_000), bracket_source(4_200_000)
        yield markov, source_config(markov, hidden_size=128, seq_len=32, num_steps=10_000)
        yield brackets, source_config(brackets, hidden_size=128, seq_len=50, num_steps=2400)


def source_config(source: Source, hidden_size: int, seq_len: int, num_steps: int) -> ConfigDict:
    """Return the default recipe with other sizes, and without dropout."""
    config = base_config()
    config.batch_size, config.seq_len, config.num_steps = 32, seq_len, num_steps
    config.data.val_fraction = HELD_OUT_CHARS / len(source.ids_M)
    config.model.hidden_size, config.model.dropout_rate = hidden_size, 0.0
    return config


def markov_source(
    size: int, *, num_classes: int = 4, alpha: float = 0.1, vocab_size: int = 20, seed: int = 0
) -> Source:
    """Return a text of M = `size` characters of a Markov chain of order 3.

    The next character depends on the last character and on the classes of the two before it, so
    that K^2 V of the V^3 contexts differ, with K = `num_classes`. Without classes a model would
    have to memorize each context, which takes an LSTM far longer than a minute. The transition
    probabilities have a Dirichlet distribution of concentration `alpha`.
    """
    draw = np.random.default_rng(seed)
    table_KKVV = draw.dirichlet(
        np.full(vocab_size, alpha), size=(num_classes, num_classes, vocab_size)
    )
    class_V = np.arange(vocab_size) % num_classes
    rows_CV = table_KKVV[np.ix_(class_V, class_V)].reshape(-1, vocab_size)
    stationary_C = stationary_contexts(rows_CV)
    # Without the last sum, which may be rounded below 1.
    sums = np.cumsum(rows_CV, axis=1)[:, :-1].tolist()
    context, num_tails = int(draw.choice(len(rows_CV), p=stationary_C)), vocab_size**2
    ids = []
    for uniform in draw.random(size).tolist():
        character = bisect(sums[context], uniform)
        context = context % num_tails * vocab_size + character
        ids.append(character)
    entropy_rate = float(stationary_C @ entropy(rows_CV))
    return Source("Markov chain of order 3", np.array(ids, np.uint8), vocab_size, entropy_rate)


def stationary_contexts(rows_CV: np.ndarray) -> np.ndarray:
    """Return the stationary probabilities of the C = V^3 contexts, by power iteration."""
    vocab_size = rows_CV.shape[1]
    rows_VWV = rows_CV.reshape(vocab_size, -1, vocab_size)  # W: the last two characters
    now_C, change = np.full(len(rows_CV), 1 / len(rows_CV)), 1.0
    while change > 1e-12:
        new_C = np.einsum("vw,vwx->wx", now_C.reshape(vocab_size, -1), rows_VWV).ravel()
        now_C, change = new_C, float(np.abs(new_C - now_C).sum())
    return now_C


def bracket_source(
    size: int, *, num_kinds: int = 4, open_share: float = 0.4, max_depth: int = 10, seed: int = 0
) -> Source:
    """Return a text of nested brackets of several kinds, each closed by its own kind.

    A bracket is opened at depth 0, closed at `max_depth`, and between them opened with probability
    `open_share`. The kind of an opening bracket is random; that of a closing one follows from the
    stack. The depth is a birth-death chain: p(d) up(d) = p(d + 1) down(d + 1).
    """
    up_D = np.array([1.0, *[open_share] * (max_depth - 1), 0.0])
    depth_D = np.cumprod([1.0, *(up_D[:-1] / (1 - up_D[1:]))])
    depth_D /= depth_D.sum()
    choices_D2 = np.stack([up_D, 1 - up_D], axis=1)
    entropy_rate = float(depth_D @ (entropy(choices_D2) + up_D * np.log2(num_kinds)))
    draw = np.random.default_rng(seed)
    kinds = draw.integers(num_kinds, size=size).tolist()
    ups, ids = up_D.tolist(), []
    stack: list[int] = []
    for uniform, kind in zip(draw.random(size).tolist(), kinds, strict=True):
        if uniform < ups[len(stack)]:
            stack.append(kind)
            ids.append(kind)
        else:
            ids.append(num_kinds + stack.pop())
    return Source("brackets with a stack", np.array(ids, np.uint8), 2 * num_kinds, entropy_rate)


def entropy(probs_CV: np.ndarray) -> np.ndarray:
    """Return the entropy of each row of probabilities in bits."""
    safe_CV = np.where(probs_CV > 0, probs_CV, 1.0)
    return -np.sum(probs_CV * np.log2(safe_CV), axis=-1)
