import bz2
import gzip
import lzma
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlstm.evaluation.baselines import (
    COMPRESSORS,
    compressed_bits,
    count_ngrams,
    kneser_ney_bits,
    ngram_probabilities,
    uniform_bits,
    unigram_bits,
)

ORDER = 4
texts = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array)


def ids_of(book, size=None):
    characters = sorted(set(book))
    return np.array([characters.index(char) for char in book[:size]]), len(characters)


class SlowKneserNey:
    """Chen and Goodman 1999, section 4.1.6, in dictionaries of tuples."""

    def __init__(self, ids, vocab_size, order):
        self.vocab_size, self.order = vocab_size, order
        grams = {
            n: [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)] for n in range(1, order + 1)
        }
        self.counts = {order: Counter(grams[order])}
        for n in range(1, order):
            self.counts[n] = Counter(gram[1:] for gram in set(grams[n + 1]))
        self.discounts = {n: self.three_discounts(self.counts[n]) for n in self.counts}
        self.followers = {n: defaultdict(list) for n in self.counts}
        for n, counts in self.counts.items():
            for gram, count in counts.items():
                self.followers[n][gram[:-1]].append(count)

    @staticmethod
    def three_discounts(counts):
        n = [sum(count == k for count in counts.values()) for k in range(5)]
        try:
            y = n[1] / (n[1] + 2 * n[2])
            found = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
        except ZeroDivisionError:
            return [0.5] * 3
        usable = n[4] > 0 and all(0 < found[k - 1] <= k for k in (1, 2, 3))
        return found if usable else [0.5] * 3

    def discount(self, n, count):
        return self.discounts[n][min(count, 3) - 1]

    def probability(self, char, before):
        """The probability of `char` after the tuple `before`."""
        if len(before) >= self.order:
            before = before[len(before) - self.order + 1 :]
        below = self.probability(char, before[1:]) if before else 1 / self.vocab_size
        n = len(before) + 1
        followers = self.followers[n][before]
        if not followers:
            return below
        count = self.counts[n][(*before, char)]
        own = max(count - self.discount(n, count), 0) if count else 0
        left = sum(self.discount(n, follower) for follower in followers)
        return (own + left * below) / sum(followers)


@given(texts, texts)
def test_ngrams_are_those_of_plain_dictionaries(train, held_out):
    order = min(ORDER, len(train))
    slow = SlowKneserNey(train.tolist(), 5, order)
    probs = ngram_probabilities(count_ngrams(train, 5, ORDER), held_out, 5)
    wanted = [slow.probability(x, tuple(held_out[:i].tolist())) for i, x in enumerate(held_out)]
    np.testing.assert_allclose(probs, wanted, rtol=1e-12)


def test_ngrams_of_a_longer_text_with_discounts_of_its_own(book):
    ids_M, vocab_size = ids_of(book)
    slow = SlowKneserNey(ids_M[:5000].tolist(), vocab_size, ORDER)
    assert any(discounts != [0.5] * 3 for discounts in slow.discounts.values())
    held_out = ids_M[5000:5300]
    wanted = [
        math.log2(slow.probability(x, tuple(held_out[max(0, i - 9) : i].tolist())))
        for i, x in enumerate(held_out.tolist())
    ]
    bits = kneser_ney_bits(ids_M[:5000], held_out, vocab_size, ORDER)
    assert bits == pytest.approx(-np.mean(wanted[1:]), rel=1e-12)


@given(texts, texts)
def test_ngrams_are_a_distribution_after_any_text(train, before):
    levels = count_ngrams(train, 6, ORDER)  # 6: one character was never seen
    last = [ngram_probabilities(levels, np.append(before, x), 6)[-1] for x in range(6)]
    assert sum(last) == pytest.approx(1, abs=1e-12)
    assert min(last) > 0


def test_unigrams_have_one_added_to_each_count():
    train, held_out = np.array([0, 0, 1]), np.array([2, 0, 2])
    # Counts 3, 2, 1 of 6; the first held-out character does not count.
    assert unigram_bits(train, held_out, 3) == pytest.approx((math.log2(2) + math.log2(6)) / 2)
    assert uniform_bits(8) == 3


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("gzip -9", lambda raw: len(gzip.compress(raw, 9))),
        ("bz2 -9", lambda raw: len(bz2.compress(raw))),
        ("xz -9e", lambda raw: len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))),
    ],
)
def test_a_compressor_counts_what_the_held_out_part_adds(name, size, book):
    train, held_out = book[:4000] + "é", "é" + book[4000:]
    added = size((train + held_out).encode()) - size(train.encode())
    bits = compressed_bits(COMPRESSORS[name], train, held_out)
    assert bits == added * 8 / len(held_out)
    # The training part helps: without it more is needed.
    assert bits < size(held_out.encode()) * 8 / len(held_out)


def test_the_order_of_strength_on_a_text_of_words(book):
    ids_M, vocab_size = ids_of(book)
    train, held_out = ids_M[:5000], ids_M[5000:]
    three, one = (kneser_ney_bits(train, held_out, vocab_size, order) for order in (3, 1))
    unigram = unigram_bits(train, held_out, vocab_size)
    assert three < one - 1 < uniform_bits(vocab_size)
    assert one == pytest.approx(unigram, abs=0.02)
