"""Generate text with a trained run: prompts, settings and memory of one request."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from charlstm.data.corpus import open_corpus
from charlstm.data.vocab import END
from charlstm.errors import UserError
from charlstm.evaluation.dynamic import adapt, make_anchor
from charlstm.keys import derive_key
from charlstm.model import CharLSTM
from charlstm.runs.folder import Run
from charlstm.runs.machine import memory_bytes
from charlstm.sampling import CHUNK_LEN, stream, until_end

logger = logging.getLogger(__name__)

MAX_SHOWN = 10  # prompts from the training text


def check_memory(run: Run, num_prompt_chars: int, num_samples: int, length: int) -> None:
    """Raise UserError if `num_samples` texts of `length` characters do not fit into memory."""
    model = run.config.model
    # 10 % less than measured. The text and the chunks of CHUNK_LEN characters dominate.
    numbers = num_prompt_chars + 9 * CHUNK_LEN + 2 * len(run.vocab)
    numbers += 6 * model.num_layers * model.hidden_size + 5 * length
    needed = 4 * numbers * num_samples
    if needed > (there := memory_bytes()):
        raise UserError(
            f"--num_samples={num_samples} --length={length}: takes at least "
            f"{needed / 2**30:,.0f} GiB of memory, and there are {there / 2**30:,.0f}; give less "
            "at a time, with another --seed each time"
        )


def encode_prompts(
    run: Run, prompt: str, method: str, num_samples: int, seed: int = 0, unknown: str = "error"
) -> tuple[list[np.ndarray], str]:
    """Return the prompt ids of each text, and the part of them to print.

    Without a prompt a run on documents starts a new document, and another run continues random
    passages of its training text.

    Raises:
      UserError: if the prompt has no known character or is too short for `method`.
    """
    if prompt:
        ids_P = run.encode(prompt, unknown)
        if len(ids_P) == 0:
            raise UserError("the prompt has no character that the model knows; give another one")
        if method == "window" and len(ids_P) < run.config.seq_len:
            raise UserError(
                f"--method=window needs a prompt of at least {run.config.seq_len} characters, and "
                f"this one has {len(ids_P)}; give a longer one, or use --method=carry"
            )
        return [ids_P] * num_samples, run.decode(ids_P)
    if run.config.data.document_separator and method == "carry":
        return [run.vocab.encode(END)] * num_samples, ""
    chosen = np.random.default_rng(seed).integers(len(run.prompts), size=num_samples)
    for index in chosen[:MAX_SHOWN]:
        passage = run.decode(run.vocab.encode(run.prompts[index]))
        logger.info("from the training text: %r", passage)
    if len(chosen) > MAX_SHOWN:
        logger.info("and from %s other places", f"{len(chosen) - MAX_SHOWN:,}")
    return [run.vocab.encode(run.prompts[index]) for index in chosen], ""


def adapted(run: Run, model: CharLSTM, params: Any, path: str, unknown: str = "error") -> Any:
    """Return the parameters after dynamic evaluation of the text at `path`.

    Raises:
      UserError: if the text cannot be read or has fewer than two characters.
    """
    text = open_corpus(
        run.config.data,
        path,
        vocab=run.vocab,
        unknown=unknown,
        remedy="give --adapt_to=FILE, a UTF-8 text",
    )
    if len(text.ids_M) < 2:
        raise UserError(f"--adapt_to={path}: has one character, too few to learn from; give more")
    logger.info("reading %s characters of %s", f"{len(text.ids_M):,}", path)
    anchor = make_anchor(model, params, [run.vocab.encode(prompt) for prompt in run.prompts])
    return adapt(model, anchor, text.ids_M)


def generate(
    run: Run,
    model: CharLSTM,
    params: Any,
    prompts: list[np.ndarray],
    settings: dict[str, Any],
    *,
    seed: int = 0,
    chunk: int = CHUNK_LEN,
    stop_at_end: bool = True,
) -> Iterator[np.ndarray]:
    """Yield chunks ids_BT of the texts that continue `prompts`.

    Args:
      run, model, params: as load_model returns them.
      prompts: as encode_prompts returns them.
      settings: those of config.sample.
      seed: selects the random key.
      chunk: characters of a chunk.
      stop_at_end: stop once every text has reached the end of a document.
    """
    key = derive_key(run.key(seed), "sample")
    pieces = stream(
        model, params, prompts, key, seq_len=run.config.seq_len, chunk=chunk, **settings
    )
    return until_end(pieces, model.end_id if stop_at_end else None)
