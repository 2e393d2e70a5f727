"""Texts whose entropy rate is known exactly, and how close to that limit a model comes.

No model can have fewer bits per character than the rate, and a good one should have few more: a
yardstick that no corpus gives.
"""

import math
import time
from bisect import bisect
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

HELD_OUT_CHARS = 400_000  # the bits of so many vary by 0.1 % about the rate (standard deviation)
CALL_STEPS = 50
WARMUP_STEPS = 50


class Source(NamedTuple):
    """A text drawn from a process, and the bits per character that no model can go below."""

    name: str
    ids_M: np.ndarray
    vocab_size: int
    entropy_rate: float


class Recipe(NamedTuple):
    """A small model and how long it learns."""

    hidden_size: int = 128
    batch_size: int = 32
    seq_len: int = 32
    num_steps: int = 2400
    learning_rate: float = 1.6e-2


def known_sources(is_small: bool) -> Iterator[tuple[Source, Recipe]]:
    """Yield texts, and recipes that come within 2 % of their rates: half a minute each, or less.

    The small ones have fewer characters, classes, kinds and depths, and take some seconds. Their
    recipes and vocabulary sizes are equal, so that they share compiled programs.
    """
    if is_small:
        recipe = Recipe(hidden_size=64, num_steps=1000, learning_rate=3e-2)
        yield markov_source(1_430_000, num_classes=3, alpha=0.3, vocab_size=6), recipe
        yield bracket_source(1_430_000, num_kinds=3, max_depth=5), recipe
    else:
        # Enough text that nearly all that is read is new: nothing is learnt by heart.
        yield markov_source(10_600_000), Recipe(num_steps=10_000)
        yield bracket_source(4_200_000), Recipe(seq_len=50, num_steps=2400, learning_rate=8e-3)


def markov_source(
    size: int, *, num_classes: int = 4, alpha: float = 0.1, vocab_size: int = 20, seed: int = 0
) -> Source:
    """Return a text of a Markov chain of order 3.

    What comes next is drawn from a table, by the last character and the classes of the two before
    it, so that of V^3 contexts K^2 V differ. Without classes each context would be a fact of its
    own to be learnt by heart, which takes an LSTM far longer than a minute.

    Args:
      size: M.
      num_classes: K; with V each character is its own class.
      alpha: the rows of the table come from a symmetric Dirichlet distribution; the smaller, the
        sharper.
      vocab_size: V.
      seed: decides the table and the text.
    """
    draw = np.random.default_rng(seed)
    table_KKVV = draw.dirichlet(
        np.full(vocab_size, alpha), size=(num_classes, num_classes, vocab_size)
    )
    class_V = np.arange(vocab_size) % num_classes
    rows_CV = table_KKVV[np.ix_(class_V, class_V)].reshape(-1, vocab_size)
    stationary_C = stationary_contexts(rows_CV)
    # The last sum may be rounded below 1, and is not needed.
    sums = np.cumsum(rows_CV, axis=1)[:, :-1].tolist()
    context, num_tails = int(draw.choice(len(rows_CV), p=stationary_C)), vocab_size**2
    ids = []
    for uniform in draw.random(size).tolist():
        character = bisect(sums[context], uniform)
        context = context % num_tails * vocab_size + character
        ids.append(character)
    entropy_rate = float(stationary_C @ entropy(rows_CV))
    return Source("Markov chain of order 3", np.array(ids, np.uint8), vocab_size, entropy_rate)


def stationary_contexts(rows_CV: np.ndarray) -> np.ndarray:
    """Return how often a chain of order 3 is in each of its C = V^3 contexts: power iteration."""
    vocab_size = rows_CV.shape[1]
    rows_VWV = rows_CV.reshape(vocab_size, -1, vocab_size)  # W: the last two characters
    now_C, change = np.full(len(rows_CV), 1 / len(rows_CV)), 1.0
    while change > 1e-12:
        new_C = np.einsum("vw,vwx->wx", now_C.reshape(vocab_size, -1), rows_VWV).ravel()
        now_C, change = new_C, float(np.abs(new_C - now_C).sum())
    return now_C


def bracket_source(
    size: int, *, num_kinds: int = 4, open_share: float = 0.4, max_depth: int = 10, seed: int = 0
) -> Source:
    """Return a text of nested brackets of several kinds, each closed by its own kind.

    Where none is open one is opened, at the largest depth one is closed, and between them one is
    opened with probability `open_share`. Which kind is opened is a matter of chance, which one is
    closed is not: only who keeps the stack knows. The depth is a birth-death chain, which goes up
    from each depth as often as it comes down to it: p(d) up(d) = p(d + 1) down(d + 1).
    """
    up_D = np.array([1.0, *[open_share] * (max_depth - 1), 0.0])
    depth_D = np.cumprod([1.0, *(up_D[:-1] / (1 - up_D[1:]))])
    depth_D /= depth_D.sum()
    choices_D2 = np.stack([up_D, 1 - up_D], axis=1)
    entropy_rate = float(depth_D @ (entropy(choices_D2) + up_D * np.log2(num_kinds)))
    draw = np.random.default_rng(seed)
    kinds = draw.integers(num_kinds, size=size).tolist()
    ups, ids = up_D.tolist(), []
    stack: list[int] = []
    for uniform, kind in zip(draw.random(size).tolist(), kinds, strict=True):
        if uniform < ups[len(stack)]:
            stack.append(kind)
            ids.append(kind)
        else:
            ids.append(num_kinds + stack.pop())
    return Source("brackets with a stack", np.array(ids, np.uint8), 2 * num_kinds, entropy_rate)


def entropy(probs_CV: np.ndarray) -> np.ndarray:
    """Return the bits of each row of probabilities."""
    safe_CV = np.where(probs_CV > 0, probs_CV, 1.0)
    return -np.sum(probs_CV * np.log2(safe_CV), axis=-1)


def learn(source: Source, recipe: Recipe) -> dict[str, Any]:
    """Train a model on a text but for its end, and return how far from the limit it is there."""
    import jax
    import optax

    from charlstm import CharLSTM, init_state, make_eval_step, make_train_step, make_train_steps
    from charlstm.data.batches import Streams, read_steps
    from charlstm.model import zero_carry
    from charlstm.steps import evaluate

    begin = time.perf_counter()
    _, batch_size, seq_len, num_steps, peak = recipe
    model = CharLSTM(vocab_size=source.vocab_size, hidden_size=recipe.hidden_size)
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, WARMUP_STEPS, num_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    state = init_state(model, optimizer, jax.random.key(0), batch_size)
    train_steps = make_train_steps(make_train_step(model, optimizer))
    train_steps = jax.jit(train_steps, donate_argnums=0)
    batches = Streams(source.ids_M[:-HELD_OUT_CHARS], batch_size, seq_len)
    for step in range(0, num_steps, CALL_STEPS):
        count = min(CALL_STEPS, num_steps - step)
        state, _ = train_steps(state, read_steps(batches, step, count, CALL_STEPS), count)
    held_out = Streams(source.ids_M[-HELD_OUT_CHARS:], batch_size, seq_len, context=seq_len)
    result = evaluate(
        jax.jit(make_eval_step(model)),
        state.params,
        zero_carry(model, batch_size),
        held_out.epoch(),
    )
    bits = result["loss"] / math.log(2)
    return {
        "source": source.name,
        "vocab_size": source.vocab_size,
        "recipe": recipe._asdict(),
        "entropy_rate": source.entropy_rate,
        "bits_per_char": bits,
        "excess": bits / source.entropy_rate - 1,
        "training_characters": len(batches.ids_M),
        "characters_read": num_steps * batch_size * seq_len,
        "seconds": time.perf_counter() - begin,
    }
