"""Learning-rate schedules, optimizers and weight averaging, as optax transformations."""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def make_schedule(config: ConfigDict, num_steps: int, rate_scale: float = 1.0) -> optax.Schedule:
    """Return the learning rate by step: a linear warm-up, then `config.optimizer.schedule`.

    Args:
      config: config of the run, with a section `optimizer`.
      num_steps: number of steps after which 'cosine' and 'linear' reach
        `config.optimizer.end_lr_ratio` of the peak.
      rate_scale: multiplies the whole schedule.
    """
    peak = config.optimizer.learning_rate * rate_scale
    end_lr_ratio = config.optimizer.end_lr_ratio
    # A run shorter than its warm-up must reach the peak, too.
    warmup_steps = min(config.optimizer.warmup_steps, num_steps // 2)
    rest = max(1, num_steps - warmup_steps)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=end_lr_ratio),
        "linear": optax.linear_schedule(peak, peak * end_lr_ratio, rest),
    }[config.optimizer.schedule]
    if warmup_steps == 0:
        return after
    # From above 0, so that the first step has an effect.
    warmup = optax.linear_schedule(peak / warmup_steps, peak, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return the optimizer that `config.optimizer` describes, with this `schedule`.

    The tree of its state is the same for any schedule. With config.optimizer.average_window the
    state contains an average of the parameters; averaged_params returns it.
    """
    b2, epsilon = config.optimizer.b2, config.optimizer.epsilon
    rule = {
        "adam": lambda: optax.adam(schedule, b2=b2, eps=epsilon),
        "adamw": lambda: optax.adamw(
            schedule, b2=b2, eps=epsilon, weight_decay=config.optimizer.weight_decay
        ),
        "cautious_adamw": lambda: optax.chain(
            cautious(optax.scale_by_adam(b2=b2, eps=epsilon)),
            optax.add_decayed_weights(config.optimizer.weight_decay),
            optax.scale_by_learning_rate(schedule),
        ),
        "keras_adam": lambda: keras_adam(schedule, b2, epsilon),
    }[config.optimizer.name]()
    rules = [rule]
    if config.optimizer.clip_norm:
        rules = [optax.clip_by_global_norm(config.optimizer.clip_norm), *rules]
    if config.optimizer.average_window:
        rules = [*rules, average_params(config.optimizer.average_window)]
    return optax.chain(*rules) if len(rules) > 1 else rule


def update_with(
    optimizer: optax.GradientTransformation,
    grads: Any,
    opt_state: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, Any]:
    """Call optimizer.update with those of `extra_args` that it accepts.

    Raises:
      ValueError: if it needs other arguments.
    """
    parameters = inspect.signature(optimizer.update).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    accepted = {name: arg for name, arg in extra_args.items() if takes_any or name in parameters}
    try:
        return optimizer.update(grads, opt_state, params, **accepted)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"optimizer: update failed ({error}); its arguments are a plain tree of parameters "
            f"(optax.lookahead needs another) and {', '.join(accepted) or 'no extra arguments'}"
        ) from error


def cautious(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Drop the updates of `rule` whose sign disagrees with the current gradient.

    If n of the d updates of an array remain, they are multiplied by d / (n + 1) to keep the size of
    the whole update (Liang et al. 2024, arXiv 2411.16085, algorithm 1).
    """

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        directions, state = rule.update(grads, state, params)

        def mask(direction: jax.Array, grad: jax.Array) -> jax.Array:
            agrees = direction * grad > 0
            return jnp.where(agrees, direction * (agrees.size / (jnp.sum(agrees) + 1)), 0)

        return jax.tree.map(mask, directions, grads), state

    return optax.GradientTransformation(rule.init, update)


class AverageState(NamedTuple):
    """State of average_params."""

    count: jax.Array  # type: ignore[assignment]  # int32, number of steps
    average: Any  # the tree of the parameters


def average_params(window: float) -> optax.GradientTransformation:
    """Average the parameters after each update, and leave the updates unchanged.

    Step t has the weight 1 / (1 + window t), so the average covers about the last `window` of all
    steps so far, a fraction: polynomial-decay averaging (Shamir and Zhang 2013, arXiv 1212.1824,
    section 4) with eta = 1 / window - 1. It must be the last transformation of a chain.
    """

    def init(params: Any) -> AverageState:
        # A copy, since a donated state must not contain an array twice.
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: AverageState, params: Any) -> tuple[Any, AverageState]:
        weight = 1 / (1 + window * state.count)
        average = optax.incremental_update(
            optax.apply_updates(params, updates), state.average, weight
        )
        return updates, AverageState(state.count + 1, average)

    return optax.GradientTransformation(init, update)


def averaged_params(params: Any, opt_state: Any) -> Any:
    """Return the averaged parameters in `opt_state`, or `params` if it has none."""
    is_average = lambda node: isinstance(node, AverageState)  # noqa: E731
    nodes = jax.tree.leaves(opt_state, is_leaf=is_average)
    return next((node.average for node in nodes if is_average(node)), params)


def keras_adam(schedule: optax.Schedule, b2: float, epsilon: float) -> optax.GradientTransformation:
    """Return Adam as in Keras, which adds epsilon before the bias correction.

    This is the 'epsilon hat' of Kingma and Ba 2014 (arXiv 1412.6980, end of section 2). Early steps
    differ where gradients are as small as epsilon, as in most of an untrained recurrent kernel.
    """

    def corrected(count: jax.Array) -> jax.Array:
        return epsilon / jnp.sqrt(1 - b2 ** (count + 1.0))

    scale_by_adam = optax.inject_hyperparams(optax.scale_by_adam, static_args=("b1", "b2"))
    return optax.chain(
        scale_by_adam(b1=0.9, b2=b2, eps=corrected), optax.scale_by_learning_rate(schedule)
    )
