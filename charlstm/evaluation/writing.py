"""Generate text with a trained run: prompts, settings, memory and output."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from charlstm.copy_limit import CopyIndex, CopyLimit, index_copies
from charlstm.data.cleaning import CleaningStats
from charlstm.data.corpus import open_corpus
from charlstm.data.vocab import END
from charlstm.errors import UserError
from charlstm.evaluation.dynamic import adapt, make_anchor
from charlstm.evaluation.endings import until_ends
from charlstm.evaluation.sample_check import open_training_part
from charlstm.evaluation.surprise import predict_text
from charlstm.keys import derive_key
from charlstm.model import CharLSTM
from charlstm.runs.folder import Run
from charlstm.runs.machine import memory_bytes
from charlstm.streaming import CHUNK_LEN, stream

logger = logging.getLogger(__name__)

MAX_LOGGED = 10  # prompts from the training text, and figures
INDEX_BYTES = 9  # of memory per character of a text whose copies are limited


class Writing(NamedTuple):
    """Texts that are generated while `pieces` is iterated over."""

    opening: str  # the prompt, if there is one to print
    pieces: Iterator[list[np.ndarray]]  # the next ids of each of B texts


def check_memory(
    run: Run, num_prompt_chars: int, num_samples: int, length: int, flag: str = "num_samples"
) -> None:
    """Raise UserError if generating does not fit into memory.

    Args:
      run: the run that generates.
      num_prompt_chars: characters of the prompt.
      num_samples: texts generated at once.
      length: characters of each text that are held until the end; 0 if they are printed at once.
      flag: what sets the number of texts, for the message.
    """
    model = run.config.model
    # 10 % less than measured. The text and the chunks of CHUNK_LEN characters dominate.
    numbers = num_prompt_chars + 9 * CHUNK_LEN + 2 * len(run.vocab)
    numbers += 6 * model.num_layers * model.hidden_size + 5 * length
    needed = 4 * numbers * num_samples
    if needed > (available := memory_bytes()):
        texts = f"--{flag}={num_samples}" + (f" --length={length}" if length else "")
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
    best_of: int = 1,
    seed: int = 0,
    unknown: str = "error",
    stop: str = "",
    stop_at_end: bool = True,
    no_copy: int = 0,
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
      best_of: the number of texts of which one is chosen (see `choose`), with num_samples=1.
      seed: selects the random key and the passages.
      unknown: what to do with characters outside the vocabulary: 'error', 'drop' or 'replace'.
      stop: each text ends before it, if it is not empty; cleaned as the prompt is.
      stop_at_end: stop once every text has reached the end of a document.
      no_copy: the longest verbatim copy of the training part, in characters; 0 allows any. A copy
        that begins in `prompt` counts as soon as it reaches beyond it.
      chunk: characters of a chunk.
      settings: values that replace those of config.sample.

    Raises:
      UserError: for a prompt without known characters or too short for the method, an unknown
        character in `stop`, a missing training part, or if every character would be a copy.
    """
    if num_samples > 1 and best_of > 1:
        raise UserError(f"--num_samples={num_samples}: --best_of={best_of} shows one text")
    settings = run.config.sample.to_dict() | settings
    index = index_training(run, no_copy) if no_copy else None
    ends = [_encode_stop(run, stop)] if stop else []
    if stop_at_end and model.end_id is not None:
        ends.append(np.array([model.end_id]))
    if prompt:
        prompts = [_encode_prompt(run, prompt, settings["method"], unknown)]
    else:
        # All texts of which one is chosen continue the same passage.
        prompts = _draw_prompts(run, settings["method"], num_samples, seed)
    prompts *= max(num_samples, best_of) // len(prompts)
    shown = prompts if prompt else [ids_P[:0] for ids_P in prompts]
    limit = None if index is None else CopyLimit(index, shown)
    options = {"seq_len": run.config.seq_len, "chunk": chunk, "limit": limit}
    key = derive_key(run.key(seed), "sample")
    pieces = stream(model, params, prompts, key, **options, **settings)
    writing = Writing(run.decode(shown[0]), until_ends(pieces, ends))
    return choose(writing, model, params, prompts) if best_of > 1 else writing


def choose(
    writing: Writing, model: CharLSTM, params: Any, prompts: Sequence[np.ndarray]
) -> Writing:
    """Return the text with the fewest bits per character given its prompt, and log them.

    The model reads each text statefully, at temperature 1 and without filters. A text without
    characters is the last choice.
    """
    texts = collect(writing)
    bits = []
    for ids_P, ids_L in zip(prompts, texts, strict=True):
        whole = predict_text(model, params, np.concatenate([ids_P, ids_L]), num_top=1)
        bits.append(float(whole.bits_M[len(ids_P) :].mean()) if len(ids_L) else math.inf)
    best = int(np.argmin(bits))
    listed = ", ".join(f"{value:.3f}" for value in sorted(bits)[:MAX_LOGGED])
    logger.info("bits per character of the best of %s texts: %s", len(texts), listed)
    return Writing(writing.opening, iter([[texts[best]]]))


def collect(writing: Writing) -> list[np.ndarray]:
    """Return ids_L of each text."""
    pieces = zip(*writing.pieces, strict=True)
    return [np.concatenate(parts) for parts in pieces]


def show_each(writing: Writing, run: Run, show: Callable[[str], None]) -> list[np.ndarray]:
    """Show complete texts with a form feed between them; return ids_L of each."""
    texts = collect(writing)
    for index, ids_L in enumerate(texts):
        show(("\n\f\n" if index else "") + writing.opening + run.decode(ids_L))
    return texts


def show_stream(writing: Writing, run: Run, show: Callable[[str], None]) -> list[np.ndarray]:
    """Show one text piece by piece; return [ids_L]."""
    parts = [np.zeros(0, np.int32)]
    show(writing.opening)
    for [ids_T] in writing.pieces:
        parts.append(ids_T)
        show(run.decode(ids_T))
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


def index_training(run: Run, length: int) -> CopyIndex:
    """Return the index that keeps copies of the training part within `length` characters.

    Raises:
      UserError: if the text of the run is missing or the index does not fit into memory.
    """
    train_M = open_training_part(run, f"--no_copy={length}")
    needed = INDEX_BYTES * len(train_M)
    if needed > (available := memory_bytes()):
        raise UserError(
            f"--no_copy={length}: needs {needed / 2**30:,.1f} GiB of memory for "
            f"{len(train_M):,} characters, and {available / 2**30:,.1f} are available; omit it"
        )
    return index_copies(train_M, length, len(run.vocab))


def _encode_prompt(run: Run, prompt: str, method: str, unknown: str) -> np.ndarray:
    ids_P = run.vocab.encode(_clean(run, prompt, "the prompt"), unknown)
    if len(ids_P) == 0:
        raise UserError("the prompt has no character that the model knows; give another one")
    if method == "window" and len(ids_P) < run.config.seq_len:
        raise UserError(
            f"--method=window needs a prompt of at least {run.config.seq_len} characters, and "
            f"this one has {len(ids_P)}; give a longer one, or use --method=carry"
        )
    return ids_P


def _encode_stop(run: Run, stop: str) -> np.ndarray:
    cleaned = _clean(run, stop, "--stop")
    if not cleaned:
        raise UserError(f"--stop={stop}: nothing is left of it after cleaning; give another one")
    for char in cleaned:
        if char not in run.vocab:
            raise UserError(
                f"--stop={stop}: the model does not know the character {char!r} "
                f"(U+{ord(char):04X}), thus never writes it; give another one"
            )
    return run.vocab.encode(cleaned)


def _clean(run: Run, text: str, name: str) -> str:
    stats = CleaningStats()
    cleaned = run.cleaning.apply_to(text, stats)
    if stats.num_cut:
        logger.warning(
            "%s: %s characters of Project Gutenberg's header and licence left out",
            name,
            f"{stats.num_cut:,}",
        )
    return cleaned


def _draw_prompts(run: Run, method: str, num_samples: int, seed: int) -> list[np.ndarray]:
    if run.config.data.document_separator and method == "carry":
        return [run.vocab.encode(END)] * num_samples
    if not run.prompts:
        raise UserError(f"{run.workdir}: has no passages of its training text; give --prompt=TEXT")
    chosen = np.random.default_rng(seed).integers(len(run.prompts), size=num_samples)
    for index in chosen[:MAX_LOGGED]:
        passage = run.decode(run.vocab.encode(run.prompts[index]))
        logger.info("from the training text: %r", passage)
    if len(chosen) > MAX_LOGGED:
        logger.info("and from %s other places", f"{len(chosen) - MAX_LOGGED:,}")
    return [run.vocab.encode(run.prompts[index]) for index in chosen]
