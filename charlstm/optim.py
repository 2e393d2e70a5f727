"""Learning-rate schedules and optimizers, all optax's own."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def make_schedule(config: ConfigDict, num_steps: int, rate_scale: float = 1.0) -> optax.Schedule:
    """Return the learning rate as a function of the step: a linear warm-up, then the schedule.

    Args:
      config: the run's; reads config.optimizer.
      num_steps: the length of the run, at which 'cosine' and 'linear' reach 0.
      rate_scale: multiplies all of it.
    """
    peak = config.optimizer.learning_rate * rate_scale
    # A run shorter than its warm-up would otherwise never train at its own rate.
    warmup_steps = min(config.optimizer.warmup_steps, num_steps // 2)
    rest = max(1, num_steps - warmup_steps)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
    }[config.optimizer.schedule]
    if warmup_steps == 0:
        return after
    # Begins above 0, so that the first step already moves.
    warmup = optax.linear_schedule(peak / warmup_steps, peak, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return the optimizer that `config.optimizer` describes, with its `schedule`.

    Its state has the same tree for any schedule.
    """
    b2, epsilon = config.optimizer.b2, config.optimizer.epsilon
    rule = {
        "adam": lambda: optax.adam(schedule, b2=b2, eps=epsilon),
        "adamw": lambda: optax.adamw(
            schedule, b2=b2, eps=epsilon, weight_decay=config.optimizer.weight_decay
        ),
        "keras_adam": lambda: keras_adam(schedule, b2, epsilon),
    }[config.optimizer.name]()
    if config.optimizer.clip_norm == 0:
        return rule
    return optax.chain(optax.clip_by_global_norm(config.optimizer.clip_norm), rule)


def keras_adam(schedule: optax.Schedule, b2: float, epsilon: float) -> optax.GradientTransformation:
    """Return Adam as Keras has it, where epsilon is added before the correction for bias.

    This is the 'epsilon hat' of Kingma and Ba 2014 (arXiv 1412.6980, end of section 2). Early steps
    differ where gradients are as small as epsilon, as in most of an untrained recurrent kernel.
    """

    def corrected(count: jax.Array) -> jax.Array:
        return epsilon / jnp.sqrt(1 - b2 ** (count + 1.0))

    scale_by_adam = optax.inject_hyperparams(optax.scale_by_adam, static_args=("b1", "b2"))
    return optax.chain(
        scale_by_adam(b1=0.9, b2=b2, eps=corrected), optax.scale_by_learning_rate(schedule)
    )
