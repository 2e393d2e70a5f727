"""Write text with a trained run.

  python launch/sample.py --workdir=runs/default-pg345 --prompt='The castle ' --length=1000

The text goes to stdout, after the prompt if one is given; a form feed separates several texts. A
prompt is cleaned as the run's text was. Without one, a run on documents starts a new document and
stops at its end, and another run continues a random passage of its training text. Flags that are
not given have the values of the run's config.sample. On a terminal control characters appear as
escapes such as \\x1b, unless --raw is given.

--adapt_to=FILE applies dynamic evaluation to that text first; the run folder does not change.
--check compares the text with the training text: stderr shows how many of its words occur there,
and how much is copied.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from absl import flags
from etils import epath

from charlstm.cli import folders, options
from charlstm.config_check import check_setting
from charlstm.errors import UserError, printable

if TYPE_CHECKING:
    import numpy as np

    from charlstm.runs.folder import Run

# Characters of a chunk with --stream: small enough to read along also with --method=window.
STREAM_CHUNK = 16
MAX_SAMPLES = 10**7

WORKDIR = flags.DEFINE(
    options.ANY_PATH, "workdir", "", "the run folder; the last trained in runs/ if none"
)
CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "which weights")
PROMPT = flags.DEFINE_string("prompt", "", "the text to continue")
PROMPT_FILE = flags.DEFINE(
    options.LOCAL_PATH, "prompt_file", "", "a UTF-8 file that holds the prompt"
)
LENGTH = flags.DEFINE_integer("length", None, "how many characters, the prompt not counted")
TEMPERATURE = flags.DEFINE_float("temperature", None, "0 takes the most probable character")
TOP_K = flags.DEFINE_integer("top_k", None, "sample from the k most probable; 0: all")
TOP_P = flags.DEFINE_float(
    "top_p", None, "sample from the smallest set with this probability; 1: all"
)
NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", 1, "how many texts", lower_bound=1, upper_bound=MAX_SAMPLES
)
SEED = flags.DEFINE_integer(
    "seed", 0, "the same seed gives the same text", lower_bound=0, upper_bound=2**32 - 1
)
METHOD = flags.DEFINE_enum(
    "method", None, ["carry", "window"], "one step per character, or a window for each"
)
ADAPT_TO = flags.DEFINE(
    options.ANY_PATH, "adapt_to", "", "a UTF-8 text for dynamic evaluation first"
)
STREAM = flags.DEFINE_boolean("stream", False, "print characters as they are generated")
STOP_AT_END = flags.DEFINE_boolean("stop_at_end", True, "stop where a document ends")
UNKNOWN = flags.DEFINE_enum(
    "unknown",
    "error",
    ["error", "drop", "replace"],
    "unknown characters of the prompt and of --adapt_to",
)
CHECK = flags.DEFINE_boolean("check", False, "count known words and copies, on stderr")
WORDS = flags.DEFINE(
    options.LOCAL_PATH, "words", "", "a UTF-8 list of further known words for --check"
)
RAW = flags.DEFINE_boolean("raw", False, "print control characters to a terminal unchanged")


def read_prompt() -> str:
    """Return the prompt that the flags give, '' for none."""
    if PROMPT.value and PROMPT_FILE.value:
        raise UserError("--prompt and --prompt_file: give one of them")
    if not PROMPT_FILE.value:
        return PROMPT.value
    prompt = options.read_text_file(PROMPT_FILE)
    if not prompt:
        raise UserError(f"--prompt_file={PROMPT_FILE.value}: is empty")
    return prompt


def changed_settings() -> dict[str, Any]:
    """Return the settings of config.sample that the flags change, checked."""
    changed = {}
    for flag in (LENGTH, TEMPERATURE, TOP_K, TOP_P, METHOD):
        if flag.value is not None:
            try:
                check_setting(f"sample.{flag.name}", flag.value)
            except UserError as error:
                raise UserError(str(error).replace("config.sample.", "--")) from None
            changed[flag.name] = flag.value
    return changed


def write(
    run: "Run", opening: str, chunks: Iterable["np.ndarray"], end_id: int | None
) -> list["np.ndarray"]:
    """Print the chunks ids_BT, and return the ids_L of each text."""
    import numpy as np

    from charlstm.sampling import before_end

    def show(text: str) -> None:
        sys.stdout.write(printable(text) if sys.stdout.isatty() and not RAW.value else text)

    if STREAM.value:
        parts = [np.zeros(0, np.int32)]
        show(opening)
        for ids_1T in chunks:
            parts.append(before_end(ids_1T[0], end_id))
            show(run.decode(parts[-1]))
            sys.stdout.flush()
        texts = [np.concatenate(parts)]
    else:
        texts = [before_end(ids_L, end_id) for ids_L in np.concatenate(list(chunks), axis=1)]
        for number, ids_L in enumerate(texts):
            sys.stdout.write("\n\f\n" if number else "")
            show(opening + run.decode(ids_L))
    sys.stdout.write("\n")
    sys.stdout.flush()
    return texts


def main() -> None:
    """Write text as the flags say."""
    if WORDS.value and not CHECK.value:
        raise UserError(f"--words={WORDS.value}: is for --check, which is not given")
    if STREAM.value and NUM_SAMPLES.value > 1:
        raise UserError(f"--num_samples={NUM_SAMPLES.value}: --stream shows one text at a time")
    prompt, changed = read_prompt(), changed_settings()
    listed = options.read_text_file(WORDS) if WORDS.value else ""
    from charlstm.evaluation import sample_check, writing  # they import JAX
    from charlstm.runs.checkpoints import load_model
    from charlstm.runs.folder import load_run
    from charlstm.sampling import CHUNK_LEN

    workdir = folders.trained_workdir(WORKDIR.value)
    run = load_run(epath.Path(workdir))
    settings = run.config.sample.to_dict() | changed
    kept_length = 0 if STREAM.value else settings["length"]
    writing.check_memory(run, len(prompt), NUM_SAMPLES.value, kept_length)
    run, model, params = load_model(workdir, CHECKPOINT.value)
    train_M = sample_check.open_training_part(run) if CHECK.value else None
    if ADAPT_TO.value:
        params = writing.adapted(run, model, params, ADAPT_TO.value, UNKNOWN.value)
    prompts, opening = writing.encode_prompts(
        run, prompt, settings["method"], NUM_SAMPLES.value, SEED.value, UNKNOWN.value
    )
    chunks = writing.generate(
        run,
        model,
        params,
        prompts,
        settings,
        seed=SEED.value,
        chunk=STREAM_CHUNK if STREAM.value else CHUNK_LEN,
        stop_at_end=STOP_AT_END.value,
    )
    texts = write(run, opening, chunks, model.end_id if STOP_AT_END.value else None)
    if train_M is not None:
        sample_check.log_report(texts, train_M, run.vocab, listed)


if __name__ == "__main__":
    app.run(main, "--prompt='The castle ' --length=500 --temperature=0.7")
