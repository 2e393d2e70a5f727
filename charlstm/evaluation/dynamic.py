"""Dynamic evaluation: the model adapts to the text while it is evaluated.

Krause, Kahembwe, Murray and Renals 2018, 'Dynamic evaluation of neural sequence models' (arXiv
1709.07432). Each window is predicted before the model learns from it, so that the losses are those
of unseen text.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from charlstm.data.batches import Batch, Streams
from charlstm.errors import ArgumentError
from charlstm.model import Carry, CharLSTM, zero_carry
from charlstm.steps import make_score_step

# Chosen with a model of 256 units on text before the last tenth of Dracula.
WINDOW = 20
RATE = 2e-4
DECAY = 1e-3
# One exploding gradient would spoil all later predictions.
CLIP_NORM = 1.0
# Share of the mean scale, added so that a parameter with rare gradients does not jump.
FLOOR = 0.1


class Anchor(NamedTuple):
    """The trained parameters, and the scales of their gradients."""

    params: Any
    scales: Any  # like params: the root mean square of each gradient in training


class DynamicState(NamedTuple):
    """The adapted parameters and the carry."""

    params: Any
    carry: Carry


def make_anchor(model: CharLSTM, params: Any, texts: Sequence[np.ndarray]) -> Anchor:
    """Return the anchor of a trained model, with scales measured on pieces of its training text.

    Raises:
      ArgumentError: if there is no piece, or one has fewer than two characters.
    """
    length = min(map(len, texts), default=0)
    if not texts:
        raise ArgumentError(
            "dynamic evaluation needs passages of the training text, which this model does not "
            "have; use the run that it came from"
        )
    if length < 2:
        raise ArgumentError(
            f"texts: have {length} character(s) each, too few for dynamic evaluation; "
            "use a run with config.seq_len of at least 2"
        )
    ids_ST = np.stack([text[:length] for text in texts]).astype(np.int32)
    return Anchor(params, jax.jit(make_gradient_scales(model))(params, jax.device_put(ids_ST)))


def make_gradient_scales(model: CharLSTM) -> Callable[[Any, jax.Array], Any]:
    """Return scales(params, ids_ST) -> the root mean square of each gradient over S texts."""

    score_step = make_score_step(model)

    def mean_nats(params: Any, ids_T: jax.Array) -> jax.Array:
        inputs_1T, targets_1T = ids_T[None, :-1], ids_T[None, 1:]
        weights_1T, reset_1 = jnp.ones(inputs_1T.shape), jnp.ones(1, bool)
        batch = Batch(inputs_1T, targets_1T, weights_1T, reset_1)
        _, (nats_1T, _) = score_step(params, zero_carry(model, 1), batch)
        return jnp.mean(nats_1T)

    def scales(params: Any, ids_ST: jax.Array) -> Any:
        def add(sums: Any, ids_T: jax.Array) -> tuple[Any, None]:
            grads = clip(jax.grad(mean_nats)(params, ids_T))
            return jax.tree.map(lambda total, grad: total + grad**2, sums, grads), None

        sums, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), ids_ST)
        return jax.tree.map(lambda total: jnp.sqrt(total / len(ids_ST)), sums)

    return scales


def clip(grads: Any) -> Any:
    """Return gradients with a global norm of at most CLIP_NORM."""
    return optax.clip_by_global_norm(CLIP_NORM).update(grads, optax.EmptyState())[0]


def make_dynamic_step(
    model: CharLSTM, rate: float = RATE, decay: float = DECAY
) -> Callable[[Anchor, DynamicState, Batch], tuple[DynamicState, tuple[jax.Array, jax.Array]]]:
    """Return dynamic_step(anchor, state, batch) -> (state, (nats_BT, correct_BT)), pure.

    The batch is scored first. Then each parameter moves by `rate` times its gradient divided by its
    scale, and decays towards its trained value by `decay` times its relative scale, at most 1. This
    is the paper's RMS with global statistics and RMS norm decay (section 4), with clipped gradients
    and a floor under the scales.
    """

    score_step = make_score_step(model)

    def dynamic_step(anchor: Anchor, state: DynamicState, batch: Batch) -> Any:
        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            new_carry, (nats_BT, correct_BT) = score_step(params, state.carry, batch)
            count = jnp.maximum(jnp.sum(batch.weights_BT), 1.0)
            return jnp.sum(nats_BT * batch.weights_BT) / count, (new_carry, (nats_BT, correct_BT))

        grads, (new_carry, outputs) = jax.grad(loss_fn, has_aux=True)(state.params)
        size = sum(leaf.size for leaf in jax.tree.leaves(anchor.scales))
        mean_scale = optax.tree.sum(anchor.scales) / size

        def move(
            param: jax.Array, grad: jax.Array, scale: jax.Array, trained: jax.Array
        ) -> jax.Array:
            decayed = jnp.minimum(decay * scale / mean_scale, 1.0) * (trained - param)
            return param - rate * grad / (scale + FLOOR * mean_scale) + decayed

        params = jax.tree.map(move, state.params, clip(grads), anchor.scales, anchor.params)
        return DynamicState(params, new_carry), outputs

    return dynamic_step


def adapt(model: CharLSTM, anchor: Anchor, ids_M: np.ndarray) -> Any:
    """Return the parameters after dynamic evaluation of a text of at least two characters."""
    dynamic_step = jax.jit(make_dynamic_step(model))
    state = DynamicState(anchor.params, zero_carry(model, 1))
    for batch in Streams(ids_M, 1, WINDOW).epoch():
        state, _ = dynamic_step(anchor, state, jax.device_put(batch))
    return state.params
