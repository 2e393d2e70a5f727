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
from charlstm.evaluation.dynamic import adapt, make_anchor
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


@pytest.mark.parametrize(("kind", "switch"), [(0, "enable_x64"), (1, "enable_x64"), (2, "strict")])
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
    floats = jax.tree.leaves((state.params, state.carry, trained.params, trained.carry))
    floats += [metrics[name] for name in ("loss", "count", "grad_norm")]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    assert 0 < result["loss"] < 2 * np.log(V)


def test_dynamic_evaluation_keeps_float32_with_x64():
    model = KINDS[0]
    init = jax.jit(partial(init_state, model, OPTIMIZER, batch_size=1))
    params = init(jax.random.key(0)).params
    with jax.enable_x64(True):
        anchor = make_anchor(model, params, [IDS_M[:10], IDS_M[10:20]])
        moved = adapt(model, anchor, IDS_M)
    assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype("float32")}
