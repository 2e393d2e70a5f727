"""Contenders of bench.py: this package, its Flax twin, and the machine's rate of products.

Libraries are imported in functions, as in bench_peers.py, so that a process loads its own only.
"""

from functools import partial
from typing import Any

from charlstm.bench.cases import (
    PRODUCT_SIZE,
    TEMPERATURE,
    Call,
    Case,
    Made,
    evaluation_streams,
    inputs_and_targets,
    random_ids,
)


def make_jax(case: Case, recurrence: str) -> Made:
    """Return the work of `case` done by this package with `model.recurrence=recurrence`."""
    import jax
    import optax

    from charlstm.model import CharLSTM

    model = CharLSTM(
        vocab_size=case.vocab_size,
        hidden_size=case.hidden_size,
        num_layers=case.num_layers,
        dropout_rate=case.dropout_rate,
        recurrence=recurrence,
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    state = _random_state(model, optimizer, case)
    work = {"train": _jax_train, "generate": _jax_generate, "evaluate": _jax_evaluate}[case.task]
    device = jax.devices()[0]
    given = f"model.recurrence={recurrence} under jax.jit, memory kept as by our launchers"
    return work(case, model, optimizer, state), f"{given}, on {device} ({device.device_kind})"


def _random_state(model: Any, optimizer: Any, case: Case) -> Any:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from charlstm.model import zero_carry
    from charlstm.steps import TrainState, init_state

    # Any weights will do, and init_state compiles for half as long as a training step.
    key, rng = jax.random.key(0), np.random.default_rng(0)
    shapes = jax.eval_shape(partial(init_state, model, optimizer, batch_size=1), key).params
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.05, leaf.shape), jnp.float32), shapes
    )
    carry = zero_carry(model, case.batch_size)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), carry, key)


def _jax_train(case: Case, model: Any, optimizer: Any, state: Any) -> Call:
    import jax
    import jax.numpy as jnp

    from charlstm.data.batches import Batch
    from charlstm.steps import make_train_step

    inputs_BT, targets_BT = map(jnp.asarray, inputs_and_targets(case))
    reset_B = jnp.zeros(case.batch_size, bool)
    batch = Batch(inputs_BT, targets_BT, jnp.ones(inputs_BT.shape), reset_B)
    train_step = jax.jit(make_train_step(model, optimizer), donate_argnums=0)

    def call() -> float:
        nonlocal state
        state, metrics = train_step(state, batch)
        return float(metrics["loss"])

    return call


def _jax_generate(case: Case, model: Any, optimizer: Any, state: Any) -> Call:
    import jax
    import numpy as np

    from charlstm.sampling import make_sampler

    sampler = jax.jit(make_sampler(model, case.seq_len))
    prompt_B1, key = random_ids(case, case.batch_size, 1), jax.random.key(1)
    return lambda: np.asarray(sampler(state.params, prompt_B1, key, temperature=TEMPERATURE)).size


def _jax_evaluate(case: Case, model: Any, optimizer: Any, state: Any) -> Call:
    import jax

    from charlstm.model import zero_carry
    from charlstm.steps import evaluate, make_eval_step

    batches, carry = evaluation_streams(case), zero_carry(model, case.batch_size)
    eval_step = jax.jit(make_eval_step(model))

    def call() -> float:
        windows = batches.epoch()
        return evaluate(eval_step, state.params, carry, windows)["loss"]

    return call


def make_matmul(case: Case) -> Made:
    """Return one large float32 product, whatever the case; its figure is its operations."""
    import jax

    matrix = jax.random.normal(jax.random.key(0), (PRODUCT_SIZE, PRODUCT_SIZE))
    product = jax.jit(lambda left, right: left @ right)

    def call() -> float:
        product(matrix, matrix).block_until_ready()
        return 2.0 * PRODUCT_SIZE**3

    return call, f"one float32 product of {PRODUCT_SIZE} x {PRODUCT_SIZE} matrices under jax.jit"
