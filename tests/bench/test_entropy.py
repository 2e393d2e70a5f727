import time
from itertools import islice, pairwise, product

import numpy as np
import pytest

from charlstm.bench.cases import Checkpoints
from charlstm.bench.entropy import (
    bracket_source,
    entropy,
    known_sources,
    markov_source,
    stationary_contexts,
)
from charlstm.bench.jax_backend import train


def stationary(moves):
    """Return the left eigenvector of a matrix of transitions for the eigenvalue 1."""
    values, vectors = np.linalg.eig(moves.T)
    found = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    return found / found.sum()


def test_stationary_contexts_are_an_eigenvector():
    rows_CV = np.random.default_rng(0).dirichlet([0.3] * 3, size=27)
    moves = np.zeros((27, 27))
    for a, b, c, x in product(range(3), repeat=4):
        moves[9 * a + 3 * b + c, 9 * b + 3 * c + x] = rows_CV[9 * a + 3 * b + c, x]
    np.testing.assert_allclose(stationary_contexts(rows_CV), stationary(moves), atol=1e-10)


def test_markov_text_has_its_entropy_rate():
    # The entropy of four characters minus that of three, as counted in a long text.
    source = markov_source(1_000_000, num_classes=2, vocab_size=4, alpha=0.5)
    ids = source.ids_M.astype(int)
    fours = np.bincount(ids[:-3] * 64 + ids[1:-2] * 16 + ids[2:-1] * 4 + ids[3:], minlength=256)
    threes = fours.reshape(64, 4).sum(axis=1)
    found = entropy(fours / fours.sum()) - entropy(threes / threes.sum())
    assert source.entropy_rate == pytest.approx(found, rel=0.003)
    # The order is 3: two preceding characters predict less.
    twos = fours.reshape(4, 16, 4).sum(axis=0)
    less = entropy(twos.ravel() / twos.sum()) - entropy(twos.sum(axis=1) / twos.sum())
    assert less > 1.02 * found


def test_bracket_entropy_rate_agrees_with_all_stacks():
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


def test_brackets_are_nested():
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


@pytest.mark.parametrize(
    ("is_small", "index"),
    [
        (True, 0),
        pytest.param(True, 1, marks=pytest.mark.slow),
        pytest.param(False, 0, marks=pytest.mark.slow),
        pytest.param(False, 1, marks=pytest.mark.slow),
    ],
)
def test_default_recipe_reaches_known_entropies(is_small, index):
    source, config = next(islice(known_sources(is_small), index, None))
    points = train(config.to_dict(), Checkpoints(time.time()), source)
    excess = points[-1]["bits_per_char"] / source.entropy_rate - 1
    # The entropy of a held-out text differs from its expectation by about 0.1 %.
    assert -0.005 < excess < 0.02
