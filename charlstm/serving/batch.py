"""Texts of several readers in one compiled call: pure functions from arrays to arrays.

Each reader has one row of a batch of fixed size. A row depends on its own prompt, key and settings
only. A fixed batch size keeps the rounding of a row the same, however many readers there are.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.filters import Settings
from charlstm.model import Carry, CharLSTM, zero_carry
from charlstm.sampling import PAD_ID, draw_uniforms, sample_token, step_carry

CHUNK_LEN = 16  # characters that one call writes at most, per row
PROMPT_LEN = 64  # characters of prompts that one call reads at most, per row


class TextState(NamedTuple):
    """What B texts so far determine."""

    carry: Carry
    logits_BV: jax.Array  # of the next character


class Rows(NamedTuple):
    """What the characters of B rows depend on, besides the model and the texts so far."""

    keys_BW: Any  # uint32, the data of each row's random key
    positions_B: Any  # int32, how many characters each row has written
    settings: Settings  # arrays of one number per row; no repetition penalty
    is_active_B: Any  # bool; the other rows keep their state


class Written(NamedTuple):
    """The next characters of B texts, and what the model predicts after each of them."""

    ids_BT: Any  # int32
    bits_BT: Any  # float32, the surprise of each character, at temperature 1 without filters
    top_ids_BTK: Any  # int32, the most probable next characters; 0 unless they are wanted
    top_probs_BTK: Any  # float32, their probabilities at temperature 1


def empty_state(model: CharLSTM, batch_size: int) -> TextState:
    """Return the state of B empty texts, whose next character is not predicted."""
    logits_BV = jax.device_put(np.zeros((batch_size, model.vocab_size), np.float32))
    return TextState(zero_carry(model, batch_size), logits_BV)


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def read_prompts(
    model: CharLSTM, params: Any, state: TextState, given_BT: Any, is_new_B: Any, count: Any
) -> TextState:
    """Return the state after `count` <= T more characters of B prompts.

    Args:
      model, params: the language model.
      state: of the prompts so far.
      given_BT: ids; a row with fewer characters has PAD_ID after them.
      is_new_B: rows that begin with an empty text.
      count: the number of characters of the longest row.
    """

    def empty(leaf_BX: jax.Array) -> jax.Array:
        return jnp.where(is_new_B[:, None], 0.0, leaf_BX)

    def step(index: Any, state: TextState) -> TextState:
        ids_B = given_BT[:, index]
        carry, logits_BV = step_carry(model, params, state.carry, ids_B)
        is_read_B1 = ids_B[:, None] != PAD_ID
        return TextState(carry, jnp.where(is_read_B1, logits_BV, state.logits_BV))

    return jax.lax.fori_loop(0, count, step, jax.tree.map(empty, state))


@partial(jax.jit, donate_argnames="state")
def place(state: TextState, row: Any, prompts: TextState, prompt_row: Any) -> TextState:
    """Return `state` with one row of `prompts` in one of its rows."""
    return jax.tree.map(lambda to, new: to.at[row].set(new[prompt_row]), state, prompts)


@partial(jax.jit, static_argnames=("model", "impl", "num_top"), donate_argnames="state")
def write_chunk(
    model: CharLSTM,
    impl: str,
    num_top: int,
    params: Any,
    state: TextState,
    rows: Rows,
    wants_top: Any,
    count: Any,
) -> tuple[TextState, Written]:
    """Return the state after `count` <= CHUNK_LEN more characters of B texts, and these characters.

    Character n of a row is the one that sample_step draws, in a batch of one row, with
    fold_in(key, n). Characters from `count` on are undefined.

    Args:
      model, params: the language model.
      impl: JAX's name for the implementation of the keys.
      num_top: K, at most V.
      state: of the texts so far.
      rows: what the characters depend on.
      wants_top: whether any row wants the most probable next characters.
      count: the number of characters.
    """
    uniforms_TB = row_uniforms(jax.random.wrap_key_data(rows.keys_BW, impl=impl), rows.positions_B)

    def step(index: Any, carried: Any) -> Any:
        state, logs_BV, written = carried
        ids_B = sample_token(uniforms_TB[index], state.logits_BV, rows.settings)
        own_B1 = jnp.take_along_axis(logs_BV, jnp.maximum(ids_B, 0)[:, None], axis=1)
        bits_B = jnp.abs(own_B1[:, 0]) / math.log(2)
        state = TextState(*step_carry(model, params, state.carry, ids_B))
        logs_BV = jax.nn.log_softmax(state.logits_BV)
        leaves = ids_B, bits_B, *most_probable(logs_BV, num_top, wants_top)
        return state, logs_BV, jax.tree.map(lambda to, new: to.at[index].set(new), written, leaves)

    shape = CHUNK_LEN, len(rows.positions_B)
    written = (
        *(jnp.zeros(shape, dtype) for dtype in (jnp.int32, jnp.float32)),
        *(jnp.zeros((*shape, num_top), dtype) for dtype in (jnp.int32, jnp.float32)),
    )
    start = state, jax.nn.log_softmax(state.logits_BV), written
    new_state, _, written = jax.lax.fori_loop(0, count, step, start)

    def keep(new_BX: jax.Array, old_BX: jax.Array) -> jax.Array:
        return jnp.where(rows.is_active_B[:, None], new_BX, old_BX)

    state = jax.tree.map(keep, new_state, state)
    return state, Written(*(leaf.swapaxes(0, 1) for leaf in written))


def row_uniforms(keys_B: jax.Array, positions_B: Any) -> jax.Array:
    """Return uniforms_TB for CHUNK_LEN characters of each row, the first ones at positions_B."""

    def uniform(key: jax.Array, position: jax.Array) -> jax.Array:
        return draw_uniforms(jax.random.fold_in(key, position), 1)[0]

    positions_TB = positions_B[None] + jnp.arange(CHUNK_LEN)[:, None]
    return jax.vmap(jax.vmap(uniform), in_axes=(None, 0))(keys_B, positions_TB)


def most_probable(logs_BV: jax.Array, num_top: int, is_wanted: Any) -> tuple[jax.Array, jax.Array]:
    """Return ids_BK and probabilities_BK of the most probable characters, or zeros."""

    def find() -> tuple[jax.Array, jax.Array]:
        top_logs_BK, top_ids_BK = jax.lax.top_k(logs_BV, num_top)
        return top_ids_BK, jnp.exp(top_logs_BK)

    shape = len(logs_BV), num_top
    zeros = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
    return jax.lax.cond(is_wanted, find, lambda: zeros)
