"""Settings of a sampler, and the filters that set the probability of characters to 0."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Settings(NamedTuple):
    """Settings of a sampler: numbers, or arrays of one per row, which may be traced.

    They apply in the order repetition_penalty, temperature, top_k, top_p, min_p.
    """

    temperature: Any = 1.0  # divides the logits; 0 takes the most probable character
    top_k: Any = 0  # keep the k most probable characters; 0 keeps all
    top_p: Any = 1.0  # keep the smallest set of characters with this probability; 1 keeps all
    min_p: Any = 0.0  # drop characters below this share of the highest probability; 0 keeps all
    # Subtracted from the logit of a character that continues a repetition of repetition_length
    # characters, and more for a longer one: see repetition.py. 0 costs nothing; a traced value
    # costs the search for repetitions.
    repetition_penalty: Any = 0.0
    repetition_length: Any = 20

    @property
    def penalizes(self) -> bool:
        """Return whether a repetition penalty may be above 0, of which traced values may be."""
        penalty = self.repetition_penalty
        return isinstance(penalty, jax.Array) or bool(np.any(np.asarray(penalty) > 0))


def filter_weights(weights_BV: jax.Array, settings: Settings) -> jax.Array:
    """Return `weights_BV` with 0 for the characters that top_k, top_p and min_p drop.

    Args:
      weights_BV: unnormalized probabilities; the highest of each row is 1.
      settings: of which temperature and repetition do not matter here.
    """
    weights_BV = jax.lax.cond(
        jnp.any((column(settings.top_k) > 0) | (column(settings.top_p) < 1)),
        lambda: filter_top_k_top_p(weights_BV, settings.top_k, settings.top_p),
        lambda: weights_BV,
    )
    # Nguyen et al. 2024, arXiv 2407.01082.
    return jnp.where(weights_BV >= column(settings.min_p), weights_BV, 0.0)


def filter_top_k_top_p(weights_BV: jax.Array, top_k: Any, top_p: Any) -> jax.Array:
    """Return `weights_BV` with 0 for all but the most probable characters.

    Args:
      weights_BV: unnormalized probabilities, at least one above 0 in each row.
      top_k: the number of characters to keep; 0 keeps all (Fan et al. 2018, arXiv 1805.04833).
      top_p: keep the smallest set with at least this probability, and at least one character
        (Holtzman et al. 2019, arXiv 1904.09751); 1 keeps all. It applies after top_k.
    """
    top_k, top_p = column(top_k), column(top_p)
    # The bits of nonnegative floats have the order of the floats, and XLA sorts integers on a CPU
    # three times as fast.
    bits_BV = jax.lax.bitcast_convert_type(weights_BV, jnp.int32)
    sorted_BV = jax.lax.bitcast_convert_type(-jnp.sort(-bits_BV, axis=-1), jnp.float32)
    among_BV = (jnp.arange(weights_BV.shape[-1])[None] < top_k) | (top_k <= 0)
    sums_BV = jnp.cumsum(jnp.where(among_BV, sorted_BV, 0.0), axis=-1)
    among_BV &= (sums_BV - sorted_BV < top_p * sums_BV[:, -1:]) | (top_p >= 1)
    count_B1 = jnp.maximum(jnp.sum(among_BV, axis=-1, keepdims=True), 1)
    least_B1 = jnp.take_along_axis(sorted_BV, count_B1 - 1, axis=-1)
    # Among equal weights at the limit, keep the first ones, so that ties keep no more characters.
    above_BV, ties_BV = weights_BV > least_B1, weights_BV == least_B1
    places_B1 = count_B1 - jnp.sum(above_BV, axis=-1, keepdims=True)
    is_kept_BV = above_BV | (ties_BV & (jnp.cumsum(ties_BV, axis=-1) <= places_B1))
    return jnp.where(is_kept_BV, weights_BV, 0.0)


def column(setting: Any) -> jax.Array:
    """Reshape a number, or one for each row, so that it broadcasts against rows."""
    return jnp.reshape(jnp.asarray(setting), (-1, 1))
