import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from charlstm.config import base_config
from charlstm.optim import average_params, averaged_params, make_optimizer, make_schedule

SHARE = 0.25
NUM_STEPS = 12


def descend(optimizer, num_steps=NUM_STEPS):
    """Return the params after each step down a bowl, and the last state of the optimizer."""
    params = {"w": jnp.array([3.0, -2.0])}
    opt_state, path = optimizer.init(params), []
    for _ in range(num_steps):
        updates, opt_state = optimizer.update(params, opt_state, params)
        params = optax.apply_updates(params, updates)
        path.append(params["w"])
    return np.stack(path), opt_state


def test_the_average_is_that_of_the_formula_and_leaves_the_path_as_it_was():
    plain_S2, _ = descend(optax.sgd(0.1))
    path_S2, opt_state = descend(optax.chain(optax.sgd(0.1), average_params(SHARE)))
    np.testing.assert_array_equal(path_S2, plain_S2)
    # Each step's share of the average is its weight, times what all later ones leave of it.
    weight_S = 1 / (1 + SHARE * np.arange(NUM_STEPS))
    left_S = np.append(np.cumprod((1 - weight_S)[::-1])[::-1][1:], 1.0)
    share_S = weight_S * left_S
    np.testing.assert_allclose(share_S.sum(), 1, rtol=1e-12)
    wanted = share_S @ path_S2.astype(np.float64)
    found = averaged_params({"w": jnp.zeros(2)}, opt_state)["w"]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)  # of float32, a dozen times rounded


def test_the_average_reaches_back_over_its_share_of_the_steps():
    # Of the numbers of the steps the mean is the last one less their share, up to a step or two.
    climb = optax.chain(optax.sgd(-1.0), average_params(0.1))
    params = {"w": jnp.zeros(1)}
    opt_state, unit = climb.init(params), {"w": jnp.ones(1)}
    for _ in range(1000):
        updates, opt_state = climb.update(unit, opt_state, params)
        params = optax.apply_updates(params, updates)
    lag = float(params["w"][0] - averaged_params(params, opt_state)["w"][0])
    assert 80 < lag < 100


def test_without_an_average_the_params_are_what_they_are():
    params = {"w": jnp.ones(2)}
    assert averaged_params(params, optax.adam(1e-3).init(params)) is params


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("name", ["adam", "adamw", "cautious_adamw", "keras_adam"])
def test_any_optimizer_of_a_config_takes_the_same_path_with_and_without_average(name, clip_norm):
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
    assert np.all(np.abs(average) > np.abs(plain_S2[-1]))  # it lags behind on the way down


def test_cautious_adam_is_that_of_the_formula_in_numpy():
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
    assert num_against > 50  # so there was something to leave out
    np.testing.assert_allclose(params_D, wanted_D, rtol=1e-4, atol=1e-6)  # float32, 12 steps


def test_a_new_state_holds_no_array_twice():
    # jax.jit(donate_argnums=...) refuses to be given one array twice.
    params = {"w": jnp.ones(2)}
    opt_state = average_params(SHARE).init(params)
    jax.jit(lambda *given: given, donate_argnums=(0, 1))(params, opt_state)
