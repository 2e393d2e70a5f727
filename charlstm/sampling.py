"""Sampling: a pure step from one character to the next, and loops around it."""

from __future__ import annotations  # help() then shows names such as TrainStep

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.checks import check_choice, check_count, check_ids, check_sampling
from charlstm.lstm.reference import vary_alike
from charlstm.model import Carry, CharLSTM, predict, zero_carry

PAD_ID = -1  # padding before a prompt
# Characters of one compiled call of `stream`. Preparing the weights takes as long as about 25
# characters, thus about 5 % of a call.
CHUNK_LEN = 512


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


def sample_token(
    uniforms_B: jax.Array,
    logits_BV: jax.Array,
    *,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
) -> jax.Array:
    """Return ids_B distributed as softmax(logits / temperature); temperature 0 takes the argmax.

    Each id is the inverse of the cumulative distribution at the number in `uniforms_B`, of [0, 1).
    A row with logits that are NaN gets PAD_ID, which is no character's id.
    """
    greedy_B1 = column(temperature) == 0
    below_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    scaled_BV = below_BV / jnp.where(greedy_B1, 1.0, column(temperature))
    weights_BV = jnp.where(greedy_B1, jnp.float32(below_BV == 0), jnp.exp(scaled_BV))
    weights_BV = jax.lax.cond(
        jnp.any((column(top_k) > 0) | (column(top_p) < 1)),
        lambda: filter_top_k_top_p(weights_BV, top_k, top_p),
        lambda: weights_BV,
    )
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
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
) -> tuple[Carry, jax.Array]:
    """Read one character and draw the next: (params, carry, ids_B, key) -> (carry, ids_B).

    Pure. `temperature`, `top_k` and `top_p` are numbers or arrays of one per row, and may be
    traced. charlstm.keys describes the keys that a run uses.

    Raises:
      ValueError: for an invalid option, or ids that are not below V, unless they are traced. Rows
        with invalid traced ids draw -1.
    """
    check_ids("ids_B", ids_B, model.vocab_size, ndim=1)
    check_sampling(temperature, top_k, top_p)
    logits_B1V, carry = predict(model, params, ids_B[:, None], carry)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return carry, sample_token(draw_uniforms(key, ids_B.shape[0]), logits_B1V[:, 0], **settings)


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


def initial_state(model: CharLSTM, method: str, seq_len: int, prompt_BP: Any) -> tuple[Any, Any]:
    """Return the initial state (memory, ids_B), and ids_BP, the rest of the prompt.

    `prompt_BP` are right-aligned prompts with PAD_ID before them.
    """
    if method == "carry":
        return (zero_carry(model, prompt_BP.shape[0]), prompt_BP[:, 0]), prompt_BP[:, 1:]
    # Characters before the last window are not read.
    width = prompt_BP.shape[1]
    return (prompt_BP[:, width - seq_len : -1], prompt_BP[:, -1]), prompt_BP[:, width:]


def generate_chunk(
    model: CharLSTM,
    read: Callable[..., Any],
    params: Any,
    state: Any,
    given_BT: Any,
    first: Any,
    count: Any,
    key: jax.Array,
    settings: dict[str, Any],
) -> tuple[Any, jax.Array]:
    """Return the state after `count` <= T more positions from `first` on, and their ids_BT.

    Positions below 0 belong to the prompt and are taken from `given_BT`; from 0 on, characters are
    drawn. One loop serves both, because compiling it takes most of the time of a short text.
    """
    batch_size, size = given_BT.shape
    state, given_BT, _ = vary_alike((state, jnp.asarray(given_BT), key))
    keys_T = jax.vmap(partial(jax.random.fold_in, key))(first + jnp.arange(size))
    # Drawn before the loop, where one large draw replaces many small ones.
    uniforms_TB = jax.vmap(partial(draw_uniforms, batch_size=batch_size))(keys_T)

    def step(index: Any, written: Any) -> Any:
        (memory, ids_B), ids_TB = written
        memory, logits_BV = read(model, params, memory, ids_B)
        drawn_B = sample_token(uniforms_TB[index], logits_BV, **settings)
        ids_B = jnp.where(first + index < 0, ids_TB[index], drawn_B)
        return (memory, ids_B), ids_TB.at[index].set(ids_B)

    state, ids_TB = jax.lax.fori_loop(0, count, step, (state, jnp.transpose(given_BT)))
    return state, ids_TB.T


# Compiled once per model, method and B, and shared by all streams of a process.
compiled_generate_chunk = jax.jit(generate_chunk, static_argnames=("model", "read"))


def make_sampler(
    model: CharLSTM, length: int, *, method: str = "carry", seq_len: int = 100
) -> Callable[..., jax.Array]:
    """Return sampler(params, prompt_BP, key, **options) -> ids_BL, a pure function to be compiled.

    It continues B prompts by L = `length` characters each. Character n is drawn as sample_step
    does with fold_in(key, n). A row depends on the key, its index, prompt and settings, but not on
    other rows or on L.

    Args:
      model: the language model.
      length: L, without the prompt.
      method: 'carry' passes the carry on; 'window' reads a whole window for each character.
      seq_len: length of the window of 'window', which needs prompts of at least this length.

    The options are numbers or arrays of one per row, and may be traced:
      lengths_B: the length of the prompt in each row of prompt_BP, at least 1; characters after it
        are ignored. None means all P.
      temperature: 0 takes the most probable character.
      top_k: choose among the k most probable characters; 0 means all.
      top_p: choose from the smallest set of characters with this probability; 1 means all.

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
        temperature: Any = 1.0,
        top_k: Any = 0,
        top_p: Any = 1.0,
    ) -> jax.Array:
        check_ids("prompt_BP", prompt_BP, model.vocab_size)
        batch_size, width = prompt_BP.shape
        lengths: Sequence[Any] = [width]
        if lengths_B is None:
            lengths_B = jnp.full(batch_size, width)
        elif not isinstance(lengths_B, jax.core.Tracer):
            lengths = np.asarray(lengths_B).tolist()
        check_prompts(method, seq_len, lengths, width)
        check_sampling(temperature, top_k, top_p)
        if length == 0:
            return jnp.zeros((batch_size, 0), jnp.int32)
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        state, rest_BP = initial_state(model, method, seq_len, align(prompt_BP, lengths_B))
        first = -rest_BP.shape[1]
        given_BT = jnp.pad(rest_BP, ((0, 0), (0, length)))
        count = given_BT.shape[1]
        chunk = state, given_BT, first, count
        _, ids_BT = generate_chunk(model, READERS[method], params, *chunk, key, settings)
        return ids_BT[:, count - length :]

    return sampler


def align(prompt_BP: Any, lengths_B: Any) -> jax.Array:
    """Right-align left-aligned prompts, with PAD_ID before them."""
    width = prompt_BP.shape[1]
    sources_BP = jnp.arange(width)[None] - width + column(lengths_B)
    moved_BP = jnp.take_along_axis(jnp.asarray(prompt_BP), jnp.maximum(sources_BP, 0), axis=1)
    return jnp.where(sources_BP < 0, PAD_ID, moved_BP.astype(jnp.int32))


def until_end(pieces: Iterable[np.ndarray], end_id: int | None) -> Iterator[np.ndarray]:
    """Yield pieces ids_BT of texts until every row contains `end_id`; None yields all."""
    is_ended_B: Any = False
    for ids_BT in pieces:
        yield ids_BT
        is_ended_B |= np.any(ids_BT == end_id, axis=1)
        if np.all(is_ended_B):
            return


def before_end(ids_T: np.ndarray, end_id: int | None) -> np.ndarray:
    """Return the ids before the first `end_id`, or all ids without one."""
    [ends] = np.nonzero(ids_T == end_id)
    return ids_T[: ends[0]] if len(ends) else ids_T


def stream(
    model: CharLSTM,
    params: Any,
    prompts: Sequence[np.ndarray],
    key: jax.Array,
    *,
    length: int,
    method: str = "carry",
    seq_len: int = 100,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    chunk: int = CHUNK_LEN,
) -> Iterator[np.ndarray]:
    """Yield the ids_BL of make_sampler's sampler for the same key, in pieces ids_BT.

    It compiles once per model, method and B.

    Args:
      model, params: the language model.
      prompts: B sequences of ids, each of its own length.
      key: a random key.
      length: L, without the prompts.
      method, seq_len, temperature, top_k, top_p: as in make_sampler.
      chunk: characters of prompt or text per piece, at most CHUNK_LEN.

    Raises:
      ValueError: for an invalid argument, when the first piece is requested.
    """
    check_count("length", length, least=0)
    check_count("chunk", chunk)
    check_count("the number of prompts", len(prompts))
    check_sampling(temperature, top_k, top_p)
    for prompt in prompts:
        check_ids("prompts", prompt, model.vocab_size, ndim=1)
    batch_size, width = len(prompts), max(map(len, prompts))
    check_prompts(method, seq_len, [len(prompt) for prompt in prompts], width)
    prompt_BP = np.full((batch_size, width), PAD_ID, np.int32)
    for row_P, prompt in zip(prompt_BP, prompts, strict=True):
        row_P[width - len(prompt) :] = prompt
    # Arrays of one type and size, so that other kinds of numbers do not compile again.
    settings = {
        "temperature": np.broadcast_to(np.float32(temperature), batch_size),
        "top_k": np.broadcast_to(np.int32(top_k), batch_size),
        "top_p": np.broadcast_to(np.float32(top_p), batch_size),
    }
    state, rest_BP = initial_state(model, method, seq_len, prompt_BP)
    first = -rest_BP.shape[1]
    while first < length:
        count = min(chunk, CHUNK_LEN, length - first)
        begun_BP, rest_BP = rest_BP[:, :count], rest_BP[:, count:]
        given_BT = np.pad(begun_BP, ((0, 0), (0, CHUNK_LEN - begun_BP.shape[1])))
        # Explicit, because jax.transfer_guard forbids implicit transfers.
        given = jax.device_put((state, given_BT, first, count))
        state, ids_BT = compiled_generate_chunk(
            model, READERS[method], params, *given, key, jax.device_put(settings)
        )
        if first + count > 0:
            yield np.asarray(ids_BT)[:, max(-first, 0) : count]
        first += count
