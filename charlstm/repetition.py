"""A penalty on repeated sequences: DRY ("don't repeat yourself") for characters.

It is that of p-e-w (2024, pull request 5677 of text-generation-webui): where the last m characters
occurred before, the character that followed them there loses `penalty * BASE ** (m - length)` of
its logit, for m of at least `length`. Short repetitions, of which ordinary text is full, cost
nothing, and each further character of a loop costs more. Two differences: `length` is in
characters, so BASE is the fourth root of DRY's 1.75, for about four characters per token; and no
characters break a sequence, since a text has no markup of a chat.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.filters import column

HISTORY = 1024  # characters in which an earlier occurrence is found
BASE = 1.75**0.25
MAX_PENALTY = 1e4  # more than the differences between logits


class Repeats(NamedTuple):
    """The last characters of B texts, and how long a repetition ends at each of them."""

    recent_BN: Any  # ids, negative before the beginning
    lengths_BN: Any  # N - 1: characters before and at this one that equal the last ones


def no_repeats(batch_size: int) -> Repeats:
    """Return the Repeats of B empty texts."""
    # In NumPy, because jax.transfer_guard forbids eager jnp.full.
    recent_BN = np.full((batch_size, HISTORY), -1, np.int32)
    return Repeats(recent_BN, np.zeros((batch_size, HISTORY - 1), np.int32))


def add_ids(repeats: Repeats, ids_B: jax.Array) -> Repeats:
    """Return the Repeats after one more character; a negative id repeats nothing."""
    recent_BN = jnp.concatenate([repeats.recent_BN[:, 1:], ids_B[:, None]], axis=1)
    # Both ends of a repetition move by one character, so their distance stays the same.
    is_same_BN = (recent_BN[:, :-1] == ids_B[:, None]) & (ids_B[:, None] >= 0)
    return Repeats(recent_BN, jnp.where(is_same_BN, repeats.lengths_BN + 1, 0))


@jax.jit
def add_texts(repeats: Repeats, ids_BP: jax.Array) -> Repeats:
    """Return the Repeats after P more characters."""
    return jax.lax.scan(lambda state, ids_B: (add_ids(state, ids_B), None), repeats, ids_BP.T)[0]


def penalties(repeats: Repeats, vocab_size: int, penalty: Any, length: Any) -> jax.Array:
    """Return penalties_BV, what to subtract from the logits of the next character.

    Args:
      repeats: of the text so far.
      vocab_size: V.
      penalty: for continuing a repetition of `length` characters; a number or one per row.
      length: characters that may be repeated without a penalty; a number or one per row.
    """
    num_rows = repeats.recent_BN.shape[0]
    rows_B1, followers_BN = jnp.arange(num_rows)[:, None], repeats.recent_BN[:, 1:]
    longest_BV = jnp.zeros((num_rows, vocab_size), jnp.int32)
    longest_BV = longest_BV.at[rows_B1, followers_BN].max(repeats.lengths_BN)
    excess_BV = longest_BV - column(length)
    grown_BV = column(penalty) * BASE ** jnp.float32(jnp.clip(excess_BV, 0, 500))
    return jnp.where(excess_BV >= 0, jnp.minimum(grown_BV, MAX_PENALTY), 0.0)
