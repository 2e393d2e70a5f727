"""Generate text with a trained run: prompts, settings, memory and output."""

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from charlstm.data.cleaning import CleaningStats
from charlstm.data.corpus import open_corpus
from charlstm.data.vocab import END
from charlstm.errors import UserError
from charlstm.evaluation.dynamic import adapt, make_anchor
from charlstm.keys import derive_key
from charlstm.model import CharLSTM
from charlstm.runs.folder import Run
from charlstm.runs.machine import memory_bytes
from charlstm.sampling import CHUNK_LEN, before_end, stream, until_end

logger = logging.getLogger(__name__)

MAX_LOGGED = 10  # prompts from the training text


class Writing(NamedTuple):
    """Texts that are generated while `chunks` is iterated over."""

    opening: str  # the prompt, if there is one to print
    chunks: Iterator[np.ndarray]  # ids_BT of B texts
    end_id: int | None  # the id at which a text ends


def check_memory(run: Run, num_prompt_chars: int, num_samples: int, length: int) -> None:
    """Raise UserError if generating does not fit into memory.

    Args:
      run: the run that generates.
      num_prompt_chars: characters of the prompt.
      num_samples: texts generated at once.
      length: characters of each text that are held until the end; 0 if they are printed at once.
    """
    model = run.config.model
    # 10 % less than measured. The text and the chunks of CHUNK_LEN characters dominate.
    numbers = num_prompt_chars + 9 * CHUNK_LEN + 2 * len(run.vocab)
    numbers += 6 * model.num_layers * model.hidden_size + 5 * length
    needed = 4 * numbers * num_samples
    if needed > (available := memory_bytes()):
        texts = f"--num_samples={num_samples}" + (f" --length={length}" if length else "")
        raise UserError(
            f"{texts}: needs at least {needed / 2**30:,.0f} GiB of memory, and "
            f"{available / 2**30:,.0f} are available; generate fewer texts, with another --seed "
            "each time, or shorter ones"
        )


def generate(
    run: Run,
    model: CharLSTM,
    params: Any,
    prompt: str = "",
    *,
    num_samples: int = 1,
    seed: int = 0,
    unknown: str = "error",
    stop_at_end: bool = True,
    chunk: int = CHUNK_LEN,
    **settings: Any,
) -> Writing:
    """Return texts that continue a prompt.

    Without a prompt a run on documents starts a new document, and another run continues random
    passages of its training text.

    Args:
      run, model, params: as load_model returns them.
      prompt: the text to continue, which is cleaned as the text of the run was.
      num_samples: B, the number of texts.
      seed: selects the random key and the passages.
      unknown: what to do with characters outside the vocabulary: 'error', 'drop' or 'replace'.
      stop_at_end: stop once every text has reached the end of a document.
      chunk: characters of a chunk.
      settings: values that replace those of config.sample.

    Raises:
      UserError: if the prompt has no known character or is too short for the method.
    """
    settings = run.config.sample.to_dict() | settings
    if prompt:
        prompts = [_encode_prompt(run, prompt, settings["method"], unknown)] * num_samples
        opening = run.decode(prompts[0])
    else:
        prompts, opening = _draw_prompts(run, settings["method"], num_samples, seed), ""
    key, end_id = derive_key(run.key(seed), "sample"), model.end_id if stop_at_end else None
    seq_len = run.config.seq_len
    chunks = stream(model, params, prompts, key, seq_len=seq_len, chunk=chunk, **settings)
    return Writing(opening, until_end(chunks, end_id), end_id)


def show_each(writing: Writing, run: Run, show: Callable[[str], None]) -> list[np.ndarray]:
    """Show complete texts with a form feed between them; return ids_L of each."""
    all_BL = np.concatenate(list(writing.chunks), axis=1)
    texts = [before_end(ids_L, writing.end_id) for ids_L in all_BL]
    for index, ids_L in enumerate(texts):
        show(("\n\f\n" if index else "") + writing.opening + run.decode(ids_L))
    return texts


def show_stream(writing: Writing, run: Run, show: Callable[[str], None]) -> list[np.ndarray]:
    """Show one text chunk by chunk; return [ids_L]."""
    parts = [np.zeros(0, np.int32)]
    show(writing.opening)
    for ids_1T in writing.chunks:
        parts.append(before_end(ids_1T[0], writing.end_id))
        show(run.decode(parts[-1]))
    return [np.concatenate(parts)]


def adapt_to_text(run: Run, model: CharLSTM, params: Any, path: str, unknown: str = "error") -> Any:
    """Return the parameters after dynamic evaluation of the text at `path`.

    Raises:
      UserError: if the text cannot be read or has fewer than two characters.
    """
    remedy = "give --adapt_to=FILE, a UTF-8 text"
    text = open_corpus(run.config.data, path, vocab=run.vocab, unknown=unknown, remedy=remedy)
    if len(text.ids_M) < 2:
        raise UserError(f"--adapt_to={path}: has one character, too few to learn from; give more")
    logger.info("reading %s characters of %s", f"{len(text.ids_M):,}", path)
    anchor = make_anchor(model, params, [run.vocab.encode(prompt) for prompt in run.prompts])
    return adapt(model, anchor, text.ids_M)


def _encode_prompt(run: Run, prompt: str, method: str, unknown: str) -> np.ndarray:
    stats = CleaningStats()
    ids_P = run.vocab.encode(run.cleaning.apply_to(prompt, stats), unknown)
    if stats.num_cut:
        logger.warning(
            "the prompt: %s characters of Project Gutenberg's header and licence left out",
            f"{stats.num_cut:,}",
        )
    if len(ids_P) == 0:
        raise UserError("the prompt has no character that the model knows; give another one")
    if method == "window" and len(ids_P) < run.config.seq_len:
        raise UserError(
            f"--method=window needs a prompt of at least {run.config.seq_len} characters, and "
            f"this one has {len(ids_P)}; give a longer one, or use --method=carry"
        )
    return ids_P


def _draw_prompts(run: Run, method: str, num_samples: int, seed: int) -> list[np.ndarray]:
    if run.config.data.document_separator and method == "carry":
        return [run.vocab.encode(END)] * num_samples
    chosen = np.random.default_rng(seed).integers(len(run.prompts), size=num_samples)
    for index in chosen[:MAX_LOGGED]:
        passage = run.decode(run.vocab.encode(run.prompts[index]))
        logger.info("from the training text: %r", passage)
    if len(chosen) > MAX_LOGGED:
        logger.info("and from %s other places", f"{len(chosen) - MAX_LOGGED:,}")
    return [run.vocab.encode(run.prompts[index]) for index in chosen]
