from itertools import pairwise, product

import numpy as np
import pytest

from charlstm.bench.entropy import (
    bracket_source,
    entropy,
    known_sources,
    learn,
    markov_source,
    stationary_contexts,
)


def stationary(moves):
    """Return the left eigenvector of a matrix of transitions for the eigenvalue 1."""
    values, vectors = np.linalg.eig(moves.T)
    found = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    return found / found.sum()


def test_the_contexts_of_a_chain_are_an_eigenvector_of_its_transitions():
    rows_CV = np.random.default_rng(0).dirichlet([0.3] * 3, size=27)
    moves = np.zeros((27, 27))
    for a, b, c, x in product(range(3), repeat=4):
        moves[9 * a + 3 * b + c, 9 * b + 3 * c + x] = rows_CV[9 * a + 3 * b + c, x]
    np.testing.assert_allclose(stationary_contexts(rows_CV), stationary(moves), atol=1e-10)


def test_a_chains_text_has_the_entropy_that_is_told():
    # The entropy of four characters less that of three, as they are found in a long text.
    source = markov_source(1_000_000, num_classes=2, vocab_size=4, alpha=0.5)
    ids = source.ids_M.astype(int)
    fours = np.bincount(ids[:-3] * 64 + ids[1:-2] * 16 + ids[2:-1] * 4 + ids[3:], minlength=256)
    threes = fours.reshape(64, 4).sum(axis=1)
    found = entropy(fours / fours.sum()) - entropy(threes / threes.sum())
    assert source.entropy_rate == pytest.approx(found, rel=0.003)
    # And it is of order 3: two characters before tell less.
    twos = fours.reshape(4, 16, 4).sum(axis=0)
    less = entropy(twos.ravel() / twos.sum()) - entropy(twos.sum(axis=1) / twos.sum())
    assert less > 1.02 * found


def test_the_rate_of_brackets_is_that_of_all_their_stacks():
    kinds, open_share, max_depth = 2, 0.3, 3
    stacks = [s for depth in range(max_depth + 1) for s in product(range(kinds), repeat=depth)]
    moves, bits = np.zeros((len(stacks), len(stacks))), []
    for row, stack in enumerate(stacks):
        up = 1.0 if not stack else 0.0 if len(stack) == max_depth else open_share
        next_probs = []
        if up:
            for kind in range(kinds):
                moves[row, stacks.index((*stack, kind))] = up / kinds
                next_probs.append(up / kinds)
        if up < 1:
            moves[row, stacks.index(stack[:-1])] = 1 - up
            next_probs.append(1 - up)
        bits.append(-sum(p * np.log2(p) for p in next_probs))
    source = bracket_source(10, num_kinds=kinds, open_share=open_share, max_depth=max_depth)
    assert source.entropy_rate == pytest.approx(stationary(moves) @ bits, rel=1e-10)


def test_brackets_are_nested_and_closed_by_their_own_kind():
    source = bracket_source(50_000, num_kinds=3, max_depth=5)
    stack, depths = [], []
    for bracket in source.ids_M.tolist():
        depths.append(len(stack))
        if bracket < 3:
            stack.append(bracket)
        else:
            assert stack.pop() == bracket - 3
    assert max(depths) == 5
    opened = [after > before for before, after in pairwise(depths) if 0 < before < 5]
    assert np.mean(opened) == pytest.approx(0.4, abs=0.01)


def assert_learnt(is_small):
    for source, recipe in known_sources(is_small):
        learnt = learn(source, recipe)
        # Below by no more than what the held-out text may differ from its expectation.
        assert -0.005 < learnt["excess"] < 0.02, learnt


def test_sources_of_known_entropy_are_learnt_to_2_per_cent():
    assert_learnt(is_small=True)


@pytest.mark.slow
def test_larger_sources_of_known_entropy_are_learnt_to_2_per_cent():
    assert_learnt(is_small=False)
