import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import SUM_ORDER, assert_close, assert_equal, small_config, untrained_run

from charlstm import Batch, CharLSTM, init_state, zero_carry
from charlstm.data.batches import Streams
from charlstm.errors import UserError
from charlstm.evaluation import measure
from charlstm.evaluation.dynamic import (
    CLIP_NORM,
    FLOOR,
    WINDOW,
    Anchor,
    DynamicState,
    adapt,
    make_anchor,
    make_dynamic_step,
)
from charlstm.steps import make_score_step, run_batches

V, H, T = 6, 8, 5


@pytest.fixture(scope="module")
def model():
    return CharLSTM(vocab_size=V, hidden_size=H)


@pytest.fixture(scope="module")
def params(model):
    init = jax.jit(partial(init_state, model, optax.identity(), batch_size=1))
    return jax.tree.map(np.asarray, init(jax.random.key(0)).params)


@pytest.fixture(scope="module")
def texts():
    return list(np.random.default_rng(0).integers(0, V, (7, 11)))


@partial(jax.jit, static_argnums=0)
@partial(jax.grad, argnums=1)
def gradient(model, params, ids_T, carry, weights_T):
    """Return the gradient of the weighted mean of the losses in nats."""
    logits_1TV, _ = model.apply({"params": params}, ids_T[None, :-1], carry)
    log_probs_TV = jax.nn.log_softmax(logits_1TV[0])
    nats = [-log_probs_TV[time, ids_T[time + 1]] for time in range(len(weights_T))]
    return sum(w * n for w, n in zip(weights_T, nats, strict=True)) / sum(weights_T)


@partial(jax.jit, static_argnums=0)
def dynamic_step(model, rate, decay, anchor, state, batch):
    """Take a step with traced rate and decay, to compile it once for all of them."""
    return make_dynamic_step(model, rate, decay)(anchor, state, batch)


def flat(tree):
    """All numbers of a tree, in one order."""
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])


def clipped(grads):
    return grads * min(1.0, CLIP_NORM / np.linalg.norm(grads))


def test_the_scales_are_root_mean_squares_of_clipped_gradients(model, params, texts):
    squares = []
    steep = jax.tree.map(lambda leaf: 5 * leaf, params)
    for ids_T in texts:
        grads = flat(gradient(model, steep, ids_T, zero_carry(model, 1), np.ones(10)))
        squares.append(clipped(grads) ** 2)
        assert np.linalg.norm(grads) > CLIP_NORM
    scales = flat(make_anchor(model, steep, texts).scales)
    np.testing.assert_allclose(scales, np.sqrt(np.mean(squares, axis=0)), rtol=2e-4, atol=1e-8)


@pytest.mark.parametrize(("rate", "decay"), [(0.01, 0.0), (0.0, 0.3), (0.02, 0.5)])
def test_a_step_scores_first_and_then_moves_as_the_formula_says(model, params, texts, rate, decay):
    anchor = make_anchor(model, params, texts)
    moved = jax.tree.map(lambda leaf: leaf + 0.3, params)
    ids_T, weights_T = texts[0][: T + 1].astype(np.int32), np.array([1, 1, 1, 1, 0])
    batch = Batch(ids_T[None, :-1], ids_T[None, 1:], weights_T[None], np.zeros(1, bool))
    carry = jax.tree.map(lambda leaf: leaf + 0.1, zero_carry(model, 1))
    state, scored = dynamic_step(model, rate, decay, anchor, DynamicState(moved, carry), batch)

    static_carry, static = jax.jit(make_score_step(model))(moved, carry, batch)
    assert_close(scored[0], static[0])
    np.testing.assert_array_equal(scored[1], static[1])
    assert_close(state.carry, static_carry)

    grads = clipped(flat(gradient(model, moved, ids_T, carry, weights_T)))
    scales, here, home = flat(anchor.scales), flat(moved), flat(params)
    wanted = here - rate * grads / (scales + FLOOR * scales.mean())
    wanted += np.minimum(decay * scales / scales.mean(), 1) * (home - here)
    np.testing.assert_allclose(flat(state.params), wanted, rtol=1e-4, atol=1e-6)
    assert np.abs(wanted - here).max() > 1e-3


def test_a_document_begins_from_an_empty_carry(model, params, texts):
    anchor = make_anchor(model, params, texts)
    batch = Batch(texts[0][None, :-1], texts[0][None, 1:], np.ones((1, 10)), np.ones(1, bool))
    step = jax.jit(make_dynamic_step(model))
    full = jax.tree.map(lambda leaf: leaf + 1, zero_carry(model, 1))
    found, wanted = (
        step(anchor, DynamicState(params, carry), batch) for carry in (full, zero_carry(model, 1))
    )
    assert_equal(found, wanted)


def test_a_text_that_repeats_itself_is_learnt_while_it_is_read(model, params, texts):
    ids_M = np.tile([0, 3, 1, 1, 5, 2], 600).astype(np.int32)
    anchor, batches = make_anchor(model, params, texts), Streams(ids_M, 1, WINDOW)
    step = jax.jit(make_dynamic_step(model))
    start = DynamicState(params, zero_carry(model, 1))
    outputs = run_batches(step, anchor, start, batches.epoch())
    nats = [float(nats_BT.mean()) for _, (nats_BT, _) in outputs]
    score_step = jax.jit(make_score_step(model))
    outputs = run_batches(score_step, params, zero_carry(model, 1), batches.epoch())
    first, *_, last = [float(nats_BT.mean()) for _, (nats_BT, _) in outputs]
    assert nats[0] == pytest.approx(first)
    assert nats[-2] < last - 0.1
    learnt = adapt(model, anchor, ids_M)
    state = start
    for batch in batches.epoch():
        state, _ = step(anchor, state, batch)
    np.testing.assert_array_equal(flat(learnt), flat(state.params))


def test_zero_rate_and_full_decay_give_the_anchor_or_no_change(model, params, texts):
    ones = jax.tree.map(jnp.ones_like, params)
    moved = jax.tree.map(lambda leaf: leaf + 1, params)
    batch = Batch(texts[0][None, :-1], texts[0][None, 1:], np.ones((1, 10)), np.ones(1, bool))
    for decay, wanted in ((0.0, moved), (1.0, params), (7.0, params)):
        state = DynamicState(moved, zero_carry(model, 1))
        state, _ = dynamic_step(model, 0.0, decay, Anchor(params, ones), state, batch)
        assert_close(state.params, wanted, SUM_ORDER)


def test_diverging_dynamic_evaluation_is_an_error(model, params, book_path, tmp_path, monkeypatch):
    run = untrained_run(small_config(book_path), tmp_path / "run")
    held_out = measure.open_held_out(run, "", "error", False)
    monkeypatch.setattr(measure.dynamic, "make_anchor", lambda *arguments: Anchor(params, params))
    monkeypatch.setattr(measure, "sum_losses", lambda *arguments: SimpleNamespace(loss=math.nan))
    with pytest.raises(UserError, match=r"--dynamic_rate=1000000\.0: .* lower"):
        measure._measure_dynamic(run, model, params, held_out, 1e6, 2.0)
