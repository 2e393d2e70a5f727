"""The API under JAX's options for types, promotion and transfers."""

from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from charlstm import (
    CharLSTM,
    Streams,
    derive_key,
    evaluate,
    init_state,
    make_eval_step,
    make_sampler,
    make_train_step,
    zero_carry,
)
from charlstm.evaluation.dynamic import (
    Anchor,
    DynamicState,
    make_dynamic_step,
    make_gradient_scales,
)
from charlstm.streaming import stream

V, B, T, H = 7, 2, 5, 8
IDS_M = np.random.default_rng(0).integers(V, size=60, dtype=np.int32)
BATCHES = Streams(IDS_M, B, T)
OPTIMIZER = optax.sgd(0.1)  # optax.adam fails with strict promotion


@contextmanager
def strict():
    """Refuse implicit promotion of ranks and types, and implicit transfers."""
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.transfer_guard("disallow"),
    ):
        yield


SWITCHES = {"enable_x64": lambda: jax.enable_x64(True), "strict": strict}
KINDS = [
    CharLSTM(
        V, H, multiplicative=True, recurrent_rms_norm=True, dropout_rate=0.2, recurrent_dropout=0.1
    ),
    CharLSTM(
        V,
        H,
        recurrence="flax",
        input="embed",
        embed_size=4,
        multiplicative=True,
        recurrent_rms_norm=True,
    ),
    CharLSTM(V, H, input="scaled"),
]


@pytest.mark.parametrize(("kind", "switch"), [(0, "enable_x64"), (2, "strict")])
def test_training_evaluation_and_sampling_keep_float32(kind, switch):
    model, is_first = KINDS[kind], kind == 0
    key, init = jax.random.key(0), partial(init_state, model, OPTIMIZER, batch_size=B)
    with SWITCHES[switch]():
        # Eager, as users call it, in one case; compiling the single operations takes long.
        state = init(key) if is_first else jax.jit(init)(key)
        step = jax.jit(make_train_step(model, OPTIMIZER))
        trained, metrics = step(state, jax.device_put(BATCHES(0)))
        eval_step = jax.jit(make_eval_step(model))
        result = evaluate(eval_step, trained.params, zero_carry(model, B), map(BATCHES, range(2)))
        sampler = jax.jit(make_sampler(model, 4))
        sample_key, prompt_BP = derive_key(key, "sample"), BATCHES(0).inputs_BT
        ids_BL = sampler(trained.params, jax.device_put(prompt_BP), sample_key)
        if is_first:
            pieces = stream(model, trained.params, list(prompt_BP), sample_key, length=4)
            np.testing.assert_array_equal(np.concatenate(list(pieces), axis=1), ids_BL)
    assert_float32(state.params, state.carry, trained.params, trained.carry)
    assert_float32([metrics[name] for name in ("loss", "count", "grad_norm")])
    assert 0 < result["loss"] < 2 * np.log(V)


def assert_float32(*trees):
    assert {leaf.dtype for leaf in jax.tree.leaves(trees)} == {jnp.dtype("float32")}


def test_steps_of_flax_keep_float32_with_x64():
    model = KINDS[1]
    with jax.enable_x64(True):
        init = partial(init_state, model, OPTIMIZER, batch_size=B)
        state = jax.eval_shape(lambda: init(jax.random.key(0)))
        trained, metrics = jax.eval_shape(make_train_step(model, OPTIMIZER), state, BATCHES(0))
        totals = (trained.params, zero_carry(model, B), BATCHES(0))
        carry, sums = jax.eval_shape(make_eval_step(model), *totals)
        # A loop whose carry changed its type would raise.
        jax.eval_shape(make_sampler(model, 4), state.params, BATCHES(0).inputs_BT, state.key)
    assert_float32(state.params, state.carry, trained.params, trained.carry, carry)
    assert_float32([metrics[name] for name in ("loss", "count", "grad_norm")], sums["nats"])


def test_dynamic_evaluation_keeps_float32_with_x64():
    model, batch = KINDS[0], Streams(IDS_M, 1, T)(0)
    with jax.enable_x64(True):
        init = partial(init_state, model, OPTIMIZER, batch_size=1)
        params = jax.eval_shape(lambda: init(jax.random.key(0))).params
        scales = jax.eval_shape(make_gradient_scales(model), params, IDS_M[None])
        state = DynamicState(params, zero_carry(model, 1))
        found = jax.eval_shape(make_dynamic_step(model), Anchor(params, scales), state, batch)
    assert_float32(scales, found[0], found[1][0])
