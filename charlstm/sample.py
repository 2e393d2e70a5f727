"""New text: a pure step from one character to the next, and loops around it."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from charlstm.model import Carry, CharLSTM, predict, zero_carry


def keep_probable(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Return `logits_BV` with -inf for all but the most probable characters.

    Args:
      logits_BV: finite logits.
      top_k: keep this many; 0 keeps all (Fan et al. 2018, arXiv 1805.04833).
      top_p: keep the fewest that hold at least this probability, and at least one (Holtzman et
        al. 2019, arXiv 1904.09751); 1 keeps all. With top_k, counted among what top_k keeps.
    """
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    if top_k > 0:
        # By rank, so that ties never keep more than k.
        ranks_V = jnp.arange(logits_BV.shape[-1])
        sorted_BV = jnp.where(ranks_V < top_k, sorted_BV, -jnp.inf)
    if top_p < 1:
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        sorted_BV = jnp.where(before_BV < top_p, sorted_BV, -jnp.inf)
    return jnp.take_along_axis(sorted_BV, jnp.argsort(order_BV, axis=-1), axis=-1)


def pick(
    key: jax.Array,
    logits_BV: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> jax.Array:
    """Return ids_B drawn from softmax(logits / temperature); temperature 0 takes the largest."""
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / temperature
    if top_k > 0 or top_p < 1:
        logits_BV = keep_probable(logits_BV, top_k, top_p)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def sample_step(
    params: Any,
    carry: Carry,
    ids_B: jax.Array,
    key: jax.Array,
    *,
    model: CharLSTM,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Carry, jax.Array]:
    """Read one character and draw the next: (params, carry, ids_B, key) -> (carry, ids_B).

    Pure; `model`, `temperature`, `top_k` and `top_p` are Python values, fixed when it is traced.
    """
    logits_B1V, carry = predict(model, params, ids_B[:, None], carry)
    ids_B = pick(key, logits_B1V[:, 0], temperature=temperature, top_k=top_k, top_p=top_p)
    return carry, ids_B


class Writer(NamedTuple):
    """A way to write: `start` reads the prompt, `step` gives one character of each text.

    start: (params, prompt_BP) -> memory
    step: (params, memory, key) -> (memory, ids_B)
    """

    start: Callable[[Any, jax.Array], Any]
    step: Callable[[Any, Any, jax.Array], tuple[Any, jax.Array]]


def carry_writer(model: CharLSTM, **settings: Any) -> Writer:
    """Return the writer that hands the carry on, one step of work a character."""

    def start(params: Any, prompt_BP: jax.Array) -> tuple[Carry, jax.Array]:
        carry = zero_carry(model, prompt_BP.shape[0])
        if prompt_BP.shape[1] > 1:
            _, carry = predict(model, params, prompt_BP[:, :-1], carry)
        return carry, prompt_BP[:, -1].astype(jnp.int32)

    def step(params: Any, memory: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        carry, ids_B = memory
        carry, ids_B = sample_step(params, carry, ids_B, key, model=model, **settings)
        return (carry, ids_B), ids_B

    return Writer(start, step)


def window_writer(model: CharLSTM, seq_len: int, **settings: Any) -> Writer:
    """Return the tutorial's writer, which rereads the last `seq_len` characters for each new one.

    Its start raises ValueError for a prompt of fewer than `seq_len` characters.
    """

    def start(params: Any, prompt_BP: jax.Array) -> jax.Array:
        if prompt_BP.shape[1] < seq_len:
            raise ValueError(f"a prompt of {prompt_BP.shape[1]} characters, fewer than {seq_len}")
        return prompt_BP[:, -seq_len:].astype(jnp.int32)

    def step(params: Any, window_BT: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        empty = zero_carry(model, window_BT.shape[0])
        logits_BTV, _ = predict(model, params, window_BT, empty)
        ids_B = pick(key, logits_BTV[:, -1], **settings)
        return jnp.concatenate([window_BT[:, 1:], ids_B[:, None]], axis=1), ids_B

    return Writer(start, step)


def make_writer(model: CharLSTM, method: str, seq_len: int, **settings: Any) -> Writer:
    """Return the writer of the name `method`, 'carry' or 'window'; `settings` are pick's."""
    if method == "window":
        return window_writer(model, seq_len, **settings)
    if method == "carry":
        return carry_writer(model, **settings)
    raise ValueError(f"method={method!r}: must be carry or window")


def make_sampler(
    model: CharLSTM,
    length: int,
    *,
    method: str = "carry",
    seq_len: int = 100,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """Return sampler(params, prompt_BP, key) -> ids_BL, a pure function to be compiled.

    It continues B prompts of P >= 1 characters by L = `length` characters each.

    Args:
      model: the language model.
      length: L, the prompt not counted.
      method: 'carry' or 'window'.
      seq_len: how far 'window' rereads; it needs prompts of at least this length.
      temperature: 0 takes the most probable character.
      top_k: choose among the k most probable characters; 0 means all.
      top_p: choose among the fewest characters with this much probability; 1 means all.
    """
    writer = make_writer(model, method, seq_len, temperature=temperature, top_k=top_k, top_p=top_p)

    def sampler(params: Any, prompt_BP: jax.Array, key: jax.Array) -> jax.Array:
        def step(memory: Any, index: jax.Array) -> tuple[Any, jax.Array]:
            return writer.step(params, memory, jax.random.fold_in(key, index))

        memory = writer.start(params, prompt_BP)
        _, ids_LB = jax.lax.scan(step, memory, jnp.arange(length))
        return ids_LB.T

    return sampler


def stream(
    writer: Writer, params: Any, prompt_BP: jax.Array, key: jax.Array, length: int
) -> Iterator[np.ndarray]:
    """Yield ids_B character by character, the same as make_sampler's for the same key."""
    step = jax.jit(writer.step)
    memory = jax.jit(writer.start)(params, prompt_BP)
    for index in range(length):
        memory, ids_B = step(params, memory, jax.random.fold_in(key, index))
        yield np.asarray(ids_B)
