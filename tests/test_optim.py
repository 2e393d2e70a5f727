import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import SUM_ORDER, assert_close

from charlstm.config import base_config
from charlstm.optim import average_params, averaged_params, make_optimizer, make_schedule

SHARE = 0.25
NUM_STEPS = 12


def descend(optimizer, num_steps=NUM_STEPS):
    """Return the parameters after each step on 0.5 w^2, and the last optimizer state."""
    params = {"w": jnp.array([3.0, -2.0])}

    def step(state, _):
        params, opt_state = state
        updates, opt_state = optimizer.update(params, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), params["w"]

    scan = jax.jit(lambda *state: jax.lax.scan(step, state, length=num_steps))
    (_, opt_state), path_S2 = scan(params, optimizer.init(params))
    return np.asarray(path_S2), opt_state


def test_average_matches_its_formula_and_leaves_updates_alone():
    plain_S2, _ = descend(optax.sgd(0.1))
    path_S2, opt_state = descend(optax.chain(optax.sgd(0.1), average_params(SHARE)))
    np.testing.assert_array_equal(path_S2, plain_S2)
    # A step's share of the average is its weight times (1 - weight) of each later step.
    weight_S = 1 / (1 + SHARE * np.arange(NUM_STEPS))
    left_S = np.append(np.cumprod((1 - weight_S)[::-1])[::-1][1:], 1.0)
    share_S = weight_S * left_S
    np.testing.assert_allclose(share_S.sum(), 1, rtol=1e-12)
    wanted = share_S @ path_S2.astype(np.float64)
    found = averaged_params({"w": jnp.zeros(2)}, opt_state)["w"]
    assert_close(found, wanted, SUM_ORDER)


def test_average_covers_its_window_of_the_steps():
    # The parameter counts 1,000 steps; a window of a tenth lags by a little less than 100.
    optimizer = optax.chain(optax.sgd(-1.0), average_params(0.1))
    params = {"w": jnp.zeros(1)}

    def step(state, _):
        params, opt_state = state
        updates, opt_state = optimizer.update({"w": jnp.ones(1)}, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    scan = jax.jit(lambda *state: jax.lax.scan(step, state, length=1000)[0])
    params, opt_state = scan(params, optimizer.init(params))
    lag = float(params["w"][0] - averaged_params(params, opt_state)["w"][0])
    assert 80 < lag < 100


def test_averaged_params_without_an_average_returns_params():
    params = {"w": jnp.ones(2)}
    assert averaged_params(params, optax.adam(1e-3).init(params)) is params


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("name", ["adam", "adamw", "cautious_adamw", "keras_adam"])
def test_averaging_does_not_change_the_updates(name, clip_norm):
    config = base_config()
    config.optimizer.name, config.optimizer.clip_norm = name, clip_norm
    schedule = make_schedule(config, NUM_STEPS)
    averaging_S2, opt_state = descend(make_optimizer(config, schedule))
    config.optimizer.average_window = 0.0
    plain_S2, plain_state = descend(make_optimizer(config, schedule))
    np.testing.assert_array_equal(averaging_S2, plain_S2)
    last = {"w": jnp.array(plain_S2[-1])}
    assert averaged_params(last, plain_state) is last
    average = averaged_params(last, opt_state)["w"]
    assert np.all(np.abs(average) > np.abs(plain_S2[-1]))  # it lags behind


def test_cautious_adam_matches_numpy():
    rng = np.random.default_rng(0)
    grads_SD = rng.normal(size=(NUM_STEPS, 50)).astype(np.float32)
    b1, b2, epsilon, rate, decay = 0.9, 0.95, 1e-8, 0.1, 0.02
    config = base_config()
    config.optimizer.update(clip_norm=0.0, average_window=0.0, schedule="constant", warmup_steps=0)
    config.optimizer.update(b2=b2, epsilon=epsilon, learning_rate=rate, weight_decay=decay)
    optimizer = make_optimizer(config, make_schedule(config, NUM_STEPS))
    params_D = jnp.asarray(rng.normal(size=50), jnp.float32)
    wanted_D = np.asarray(params_D, np.float64)
    opt_state, first_D, second_D = optimizer.init(params_D), np.zeros(50), np.zeros(50)
    num_against = 0
    for step, grad_D in enumerate(grads_SD, 1):
        updates_D, opt_state = optimizer.update(jnp.asarray(grad_D), opt_state, params_D)
        params_D = optax.apply_updates(params_D, updates_D)
        first_D = b1 * first_D + (1 - b1) * grad_D
        second_D = b2 * second_D + (1 - b2) * np.square(grad_D, dtype=np.float64)
        move_D = first_D / (1 - b1**step) / (np.sqrt(second_D / (1 - b2**step)) + epsilon)
        agrees_D = move_D * grad_D > 0
        num_against += np.sum(~agrees_D)
        wanted_D -= rate * (move_D * agrees_D * 50 / (agrees_D.sum() + 1) + decay * wanted_D)
    assert num_against > 50  # some updates were dropped
    assert_close(params_D, wanted_D)


def test_state_of_the_average_can_be_donated():
    # jax.jit(donate_argnums=...) refuses one array in two arguments.
    params = {"w": jnp.ones(2)}
    opt_state = average_params(SHARE).init(params)
    jax.jit(lambda *given: given, donate_argnums=(0, 1))(params, opt_state)
