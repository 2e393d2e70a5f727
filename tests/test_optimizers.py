"""The training step with optax's optimizers, also those that need more than a gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from charlstm import Batch, CharLSTM, init_state, make_train_step

V, B, T, H = 3, 2, 3, 4
MODEL = CharLSTM(V, H)
IDS_BM = np.array([[0, 1, 2, 0], [2, 0, 1, 2]], np.int32)  # each id determines the next
BATCH = Batch(IDS_BM[:, :-1], IDS_BM[:, 1:], np.ones((B, T), np.float32), np.ones(B, bool))
contrib = optax.contrib

# They differ in the kind of state or in the arguments of update.
OPTIMIZERS = {
    "apply_if_finite of MultiSteps": optax.apply_if_finite(
        optax.MultiSteps(optax.adam(0.1), every_k_schedule=2).gradient_transformation(), 3
    ),
    "chain with a key, a mask and the value": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_noise(0.01, 0.5, jax.random.key(1)),
        optax.lion(0.03),
        optax.masked(
            optax.add_decayed_weights(1e-4), lambda tree: {"dense": True, "lstm_0": False}
        ),
        contrib.reduce_on_plateau(),
    ),
    "inject_hyperparams of adam in bfloat16": optax.inject_hyperparams(
        optax.adam, static_args="mu_dtype"
    )(learning_rate=0.1, mu_dtype=jnp.bfloat16),
    "polyak_sgd": optax.polyak_sgd(),
    "sam": contrib.sam(optax.adam(0.1), optax.chain(contrib.normalize(), optax.sgd(0.05))),
    "schedule_free_adamw": contrib.schedule_free_adamw(0.1),
}


@pytest.fixture(scope="module")
def params():
    init = jax.jit(partial(init_state, MODEL, optax.identity(), batch_size=B))
    return init(jax.random.key(0)).params


def run(optimizer, params, num_steps=40, model=MODEL, **options):
    """Return the loss of each step of one compiled loop with a donated state."""
    state = init_state(model, optimizer, jax.random.key(0), B, params=params)
    step = make_train_step(model, optimizer, **options)
    scan = jax.jit(
        lambda state: jax.lax.scan(lambda state, _: step(state, BATCH), state, length=num_steps),
        donate_argnums=0,
    )
    _, metrics = scan(state)
    assert not np.any(metrics["skipped"])
    return metrics["loss"]


SLOW = "apply_if_finite of MultiSteps", "inject_hyperparams of adam in bfloat16"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in OPTIMIZERS],
)
def test_optax_optimizer_learns(name, params):
    losses = run(OPTIMIZERS[name], params)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_line_search_evaluates_with_fixed_dropout_masks(params):
    # With other masks at each evaluation the search would compare different functions.
    losses = run(optax.lbfgs(), params, model=CharLSTM(V, H, dropout_rate=0.1))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (optax.lookahead(optax.sgd(0.1), 5, 0.5), {}, "optimizer: .*lookahead"),
        (contrib.sophia(0.1), {}, "obj_fn"),
        (optax.lbfgs(), {"micro_batches": 2}, "optimizer: .*value_fn.*value, grad"),
        (optax.chain(contrib.sam(optax.sgd(0.1), optax.sgd(0.1))), {}, "optimizer: .*value"),
    ],
    ids=["lookahead", "sophia", "lbfgs with micro-batches", "sam in a chain"],
)
def test_an_optimizer_with_other_arguments_raises(optimizer, options, message):
    make = partial(init_state, MODEL, optimizer, batch_size=B)
    state = jax.eval_shape(make, jax.random.key(0))
    step = make_train_step(MODEL, optimizer, **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step, state, BATCH)
