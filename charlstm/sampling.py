"""Sampling: a pure step from one character to the next, and a loop around it."""

from __future__ import annotations  # help() then shows names such as TrainStep

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.checks import check_choice, check_count, check_ids, check_sampling
from charlstm.filters import Settings, column, filter_weights
from charlstm.lstm.reference import vary_alike
from charlstm.model import Carry, CharLSTM, predict, zero_carry
from charlstm.repetition import Repeats, add_ids, add_texts, no_repeats, penalties

PAD_ID = -1  # padding before a prompt


def sample_token(uniforms_B: jax.Array, logits_BV: jax.Array, settings: Settings) -> jax.Array:
    """Return ids_B distributed as softmax(logits / temperature); temperature 0 takes the argmax.

    Each id is the inverse of the cumulative distribution at the number in `uniforms_B`, of [0, 1).
    A row with logits that are NaN gets PAD_ID, which is no character's id.
    """
    temperature_B1 = column(settings.temperature)
    greedy_B1 = temperature_B1 == 0
    below_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    scaled_BV = below_BV / jnp.where(greedy_B1, 1.0, temperature_B1)
    weights_BV = jnp.where(greedy_B1, jnp.float32(below_BV == 0), jnp.exp(scaled_BV))
    weights_BV = filter_weights(weights_BV, settings)
    # For any rounding of the sums, a character of weight 0 is never reached, and one always is.
    sums_BV = jnp.where(weights_BV > 0, jnp.cumsum(weights_BV, axis=-1), 0.0)
    total_B1 = jnp.max(sums_BV, axis=-1, keepdims=True)
    reached_BV = sums_BV > jnp.where(greedy_B1, 0.0, column(uniforms_B) * total_B1)
    ids_B = jnp.argmax(reached_BV, axis=-1).astype(jnp.int32)
    return jnp.where(total_B1[:, 0] > 0, ids_B, PAD_ID)


def draw_uniforms(key: jax.Array, batch_size: int) -> jax.Array:
    """Return uniforms_B of [0, 1), each a function of `key` and its row index only."""
    keys_B = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(batch_size))
    return jax.vmap(partial(jax.random.uniform, dtype=jnp.float32))(keys_B)


def sample_step(
    params: Any,
    carry: Carry,
    ids_B: jax.Array,
    key: jax.Array,
    *,
    model: CharLSTM,
    repeats: Repeats | None = None,
    **settings: Any,
) -> tuple[Carry, jax.Array]:
    """Read one character and draw the next: (params, carry, ids_B, key) -> (carry, ids_B).

    Pure. charlstm.keys describes the keys that a run uses.

    Args:
      params, carry, model: the language model and its state.
      ids_B: the last character of each row.
      key: a random key.
      repeats: charlstm.repetition.add_ids of each character up to ids_B, which a
        repetition_penalty needs.
      settings: fields of charlstm.filters.Settings, such as temperature.

    Raises:
      ValueError: for an invalid setting, or ids that are not below V, unless they are traced. Rows
        with invalid traced ids draw -1.
      TypeError: for an unknown setting.
    """
    chosen = Settings(**settings)
    check_ids("ids_B", ids_B, model.vocab_size, ndim=1)
    check_sampling(chosen._asdict())
    if chosen.penalizes and repeats is None:
        raise ValueError("repetition_penalty: needs the argument repeats")
    logits_B1V, carry = predict(model, params, ids_B[:, None], carry)
    logits_BV = penalize(logits_B1V[:, 0], repeats, chosen)
    return carry, sample_token(draw_uniforms(key, ids_B.shape[0]), logits_BV, chosen)


def penalize(logits_BV: jax.Array, repeats: Repeats | None, settings: Settings) -> jax.Array:
    """Return the logits less the penalties of `repeats`; None has none."""
    if repeats is None:
        return logits_BV
    penalty, length = settings.repetition_penalty, settings.repetition_length
    return logits_BV - penalties(repeats, logits_BV.shape[-1], penalty, length)


def step_carry(
    model: CharLSTM, params: Any, carry: Carry, ids_B: jax.Array
) -> tuple[Carry, jax.Array]:
    """Return the carry after one more character, and logits_BV of the next."""
    is_read_B1 = ids_B[:, None] != PAD_ID
    logits_B1V, new_carry = predict(model, params, jnp.where(is_read_B1, ids_B[:, None], 0), carry)
    return jax.tree.map(partial(jnp.where, is_read_B1), new_carry, carry), logits_B1V[:, 0]


def step_window(
    model: CharLSTM, params: Any, recent_BT: jax.Array, ids_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the window moved by one character, and logits_BV of the next."""
    window_BT = jnp.concatenate([recent_BT, ids_B[:, None]], axis=1)
    logits_BTV, _ = predict(model, params, window_BT, zero_carry(model, ids_B.shape[0]))
    return window_BT[:, 1:], logits_BTV[:, -1]


# (model, params, memory, ids_B) -> (memory, logits_BV): one time step per character, or a whole
# window per character, as in the Keras tutorial.
READERS: dict[str, Callable[..., Any]] = {"carry": step_carry, "window": step_window}


def check_prompts(method: str, seq_len: int, lengths: Sequence[Any], width: Any) -> None:
    """Raise ValueError for an unknown method, or prompts too short for it or too long."""
    check_choice("method", method, READERS)
    check_count("seq_len", seq_len)
    needed = seq_len if method == "window" else 1
    for length in lengths:
        if length < needed:
            raise ValueError(
                f"prompt: has {length} characters; method={method!r} needs at least {needed}"
            )
        if length > width:
            raise ValueError(f"lengths_B: {length}, in a prompt_BP of {width} characters")


class SamplerState(NamedTuple):
    """The state of B texts while they are generated."""

    memory: Any  # of the reader: a carry or a window
    ids_B: Any  # the last character, not read yet
    repeats: Repeats | None  # of the characters before it; None without a repetition penalty


class Draw(NamedTuple):
    """What the characters depend on, besides the model and the texts so far."""

    key: jax.Array
    settings: Settings
    # Booleans: characters that may not come first. A row with any uses another random number.
    forbidden_BV: Any = None


def initial_state(
    model: CharLSTM, method: str, seq_len: int, prompt_BP: Any, penalizes: bool
) -> tuple[SamplerState, Any]:
    """Return the initial state, and ids_BP, the rest of the prompt.

    `prompt_BP` are right-aligned prompts with PAD_ID before them. The state records repetitions if
    it `penalizes` them.
    """
    batch_size, width = prompt_BP.shape
    repeats = no_repeats(batch_size) if penalizes else None
    if method == "carry":
        memory = zero_carry(model, batch_size)
        return SamplerState(memory, prompt_BP[:, 0], repeats), prompt_BP[:, 1:]
    if repeats is not None:
        repeats = add_texts(*jax.device_put((repeats, prompt_BP[:, :-1])))
    # Characters before the last window are not read.
    memory = prompt_BP[:, width - seq_len : -1]
    return SamplerState(memory, prompt_BP[:, -1], repeats), prompt_BP[:, width:]


def generate_chunk(
    model: CharLSTM,
    read: Callable[..., Any],
    params: Any,
    state: SamplerState,
    given_BT: Any,
    first: Any,
    count: Any,
    draw: Draw,
) -> tuple[SamplerState, jax.Array]:
    """Return the state after `count` <= T more positions from `first` on, and their ids_BT.

    Positions below 0 belong to the prompt and are taken from `given_BT`; from 0 on, characters are
    drawn. One loop serves both, because compiling it takes most of the time of a short text.
    """
    batch_size, size = given_BT.shape
    state, given_BT, _ = vary_alike((state, jnp.asarray(given_BT), draw.key))
    keys_T = jax.vmap(partial(jax.random.fold_in, draw.key))(first + jnp.arange(size))
    # Drawn before the loop, where one large draw replaces many small ones.
    uniforms_TB = jax.vmap(partial(draw_uniforms, batch_size=batch_size))(keys_T)
    if draw.forbidden_BV is not None:
        # Given that a forbidden character was drawn, its number is no longer uniform.
        again_B = draw_uniforms(jax.random.fold_in(keys_T[0], 2**31 - 1), batch_size)
        is_again_B = jnp.any(draw.forbidden_BV, axis=1)
        uniforms_TB = uniforms_TB.at[0].set(jnp.where(is_again_B, again_B, uniforms_TB[0]))

    def step(index: Any, written: Any) -> Any:
        (memory, ids_B, repeats), ids_TB = written
        repeats = None if repeats is None else add_ids(repeats, ids_B)
        memory, logits_BV = read(model, params, memory, ids_B)
        logits_BV = penalize(logits_BV, repeats, draw.settings)
        if draw.forbidden_BV is not None:
            logits_BV = jnp.where((index == 0) & draw.forbidden_BV, -jnp.inf, logits_BV)
        drawn_B = sample_token(uniforms_TB[index], logits_BV, draw.settings)
        ids_B = jnp.where(first + index < 0, ids_TB[index], drawn_B)
        return SamplerState(memory, ids_B, repeats), ids_TB.at[index].set(ids_B)

    state, ids_TB = jax.lax.fori_loop(0, count, step, (state, jnp.transpose(given_BT)))
    return state, ids_TB.T


def make_sampler(
    model: CharLSTM, length: int, *, method: str = "carry", seq_len: int = 100
) -> Callable[..., jax.Array]:
    """Return sampler(params, prompt_BP, key, **settings) -> ids_BL, a pure function to be compiled.

    It continues B prompts by L = `length` characters each. Character n is drawn as sample_step
    does with fold_in(key, n). A row depends on the key, its index, prompt and settings, but not on
    other rows or on L.

    Args:
      model: the language model.
      length: L, without the prompt.
      method: 'carry' passes the carry on; 'window' reads a whole window for each character.
      seq_len: length of the window of 'window', which needs prompts of at least this length.

    The sampler takes the fields of charlstm.filters.Settings, such as temperature and top_k, and
    lengths_B: the length of the prompt in each row of prompt_BP, at least 1; characters after it
    are ignored. None means all P.

    Raises:
      ValueError: for an invalid argument of this function or of the sampler, such as an id that is
        not below V. A row with such an id continues with -1 if the ids are traced.
    """
    check_count("length", length, least=0)
    check_prompts(method, seq_len, [], 0)

    def sampler(
        params: Any,
        prompt_BP: jax.Array,
        key: jax.Array,
        *,
        lengths_B: Any = None,
        **settings: Any,
    ) -> jax.Array:
        chosen = Settings(**settings)
        check_ids("prompt_BP", prompt_BP, model.vocab_size)
        batch_size, width = prompt_BP.shape
        lengths: Sequence[Any] = [width]
        if lengths_B is None:
            lengths_B = jnp.full(batch_size, width)
        elif not isinstance(lengths_B, jax.core.Tracer):
            lengths = np.asarray(lengths_B).tolist()
        check_prompts(method, seq_len, lengths, width)
        check_sampling(chosen._asdict())
        if length == 0:
            return jnp.zeros((batch_size, 0), jnp.int32)
        aligned_BP = align(prompt_BP, lengths_B)
        state, rest_BP = initial_state(model, method, seq_len, aligned_BP, chosen.penalizes)
        first = -rest_BP.shape[1]
        given_BT = jnp.pad(rest_BP, ((0, 0), (0, length)))
        count = given_BT.shape[1]
        chunk = state, given_BT, first, count, Draw(key, chosen)
        _, ids_BT = generate_chunk(model, READERS[method], params, *chunk)
        return ids_BT[:, count - length :]

    return sampler


def align(prompt_BP: Any, lengths_B: Any) -> jax.Array:
    """Right-align left-aligned prompts, with PAD_ID before them."""
    width = prompt_BP.shape[1]
    sources_BP = jnp.arange(width)[None] - width + column(lengths_B)
    moved_BP = jnp.take_along_axis(jnp.asarray(prompt_BP), jnp.maximum(sources_BP, 0), axis=1)
    return jnp.where(sources_BP < 0, PAD_ID, moved_BP.astype(jnp.int32))
