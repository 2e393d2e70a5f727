"""Sampling in pieces, of which one compiled program writes a text of any length."""

from __future__ import annotations  # help() then shows names such as TrainStep

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from charlstm.checks import check_count, check_ids, check_sampling
from charlstm.copy_limit import CopyLimit
from charlstm.filters import Settings
from charlstm.model import CharLSTM
from charlstm.sampling import (
    PAD_ID,
    READERS,
    Draw,
    SamplerState,
    check_prompts,
    generate_chunk,
    initial_state,
)

# Characters of one compiled call. Preparing the weights takes as long as about 25 characters, thus
# about 5 % of a call.
CHUNK_LEN = 512
MIN_LEN = 16  # characters drawn at once after one that had to be drawn again

# Compiled once per model, method and B, and shared by all streams of a process.
compiled_generate_chunk = jax.jit(generate_chunk, static_argnames=("model", "read"))


def stream(
    model: CharLSTM,
    params: Any,
    prompts: Sequence[np.ndarray],
    key: jax.Array,
    *,
    length: int,
    method: str = "carry",
    seq_len: int = 100,
    chunk: int = CHUNK_LEN,
    limit: CopyLimit | None = None,
    **settings: Any,
) -> Iterator[np.ndarray]:
    """Yield the ids_BL of make_sampler's sampler for the same key, in pieces ids_BT.

    It compiles once per model, method and B, and again for a repetition penalty or a limit. With a
    limit, the texts are those of the sampler up to the first character that would continue a copy
    beyond it; each such character is drawn again from the others. A row does not depend on others.

    Args:
      model, params: the language model.
      prompts: B sequences of ids, each of its own length.
      key: a random key.
      length: L, without the prompts.
      method, seq_len: as in make_sampler.
      chunk: characters of prompt or text per piece, at most CHUNK_LEN.
      limit: on copies of another text, at the beginning of these texts.
      settings: fields of charlstm.filters.Settings.

    Raises:
      ValueError: for an invalid argument, when the first piece is requested.
      TypeError: for an unknown setting.
      UserError: if all characters would continue a copy beyond the limit.
    """
    chosen = Settings(**settings)
    check_sampling(chosen._asdict())
    check_count("length", length, least=0)
    check_count("chunk", chunk)
    prompt_BP = align_right(model, prompts)
    check_prompts(method, seq_len, [len(prompt) for prompt in prompts], prompt_BP.shape[1])
    start = initial_state(model, method, seq_len, prompt_BP, chosen.penalizes)
    draw = Draw(key, with_rows(chosen, len(prompts)))
    if limit is not None:
        draw = draw._replace(forbidden_BV=np.zeros((len(prompts), model.vocab_size), bool))

    def run(*given: Any) -> tuple[SamplerState, np.ndarray]:
        # Explicit, because jax.transfer_guard forbids implicit transfers.
        on_device = jax.device_put(given)
        state, ids_BT = compiled_generate_chunk(model, READERS[method], params, *on_device)
        return state, np.asarray(ids_BT)

    yield from run_pieces(run, *start, draw, limit, length, chunk)


def run_pieces(
    run: Callable[..., tuple[SamplerState, np.ndarray]],
    state: SamplerState,
    rest_BP: Any,
    draw: Draw,
    limit: CopyLimit | None,
    length: int,
    chunk: int,
) -> Iterator[np.ndarray]:
    """Yield the pieces of texts that `run`, which is generate_chunk of a model, generates."""
    first, size = -rest_BP.shape[1], chunk
    while first < length:
        count, start = min(size, CHUNK_LEN, length - first), max(-first, 0)
        given_BT = np.pad(rest_BP[:, :count], ((0, 0), (0, CHUNK_LEN)))[:, :CHUNK_LEN]
        after, ids_BT = run(state, given_BT, first, count, draw)
        if limit is not None:
            kept, forbidden_BV = limit.accept(ids_BT[:, start:count])
            size = chunk
            if start + kept < count:
                # Again, for the state after the characters that are accepted.
                count, size = start + kept, max(MIN_LEN, 2 * kept)
                after, ids_BT = run(state, given_BT, first, count, draw)
            draw = draw._replace(forbidden_BV=forbidden_BV)
        if start < count:
            yield ids_BT[:, start:count]
        state, rest_BP, first = after, rest_BP[:, count:], first + count


def align_right(model: CharLSTM, prompts: Sequence[np.ndarray]) -> np.ndarray:
    """Return prompt_BP, right-aligned prompts with PAD_ID before them.

    Raises:
      ValueError: if there is no prompt, or one is not a sequence of ids.
    """
    check_count("the number of prompts", len(prompts))
    for prompt in prompts:
        check_ids("prompts", prompt, model.vocab_size, ndim=1)
    width = max(map(len, prompts))
    prompt_BP = np.full((len(prompts), width), PAD_ID, np.int32)
    for row_P, prompt in zip(prompt_BP, prompts, strict=True):
        row_P[width - len(prompt) :] = prompt
    return prompt_BP


def with_rows(settings: Settings, batch_size: int) -> Settings:
    """Return the settings as arrays of one type and size, so that others do not compile again."""
    types = {"top_k": np.int32, "repetition_length": np.int32}
    return Settings(
        *(
            np.broadcast_to(types.get(name, np.float32)(value), batch_size)
            for name, value in settings._asdict().items()
        )
    )
