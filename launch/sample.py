"""Write text with a trained run.

  python launch/sample.py --workdir=runs/default-pg345 --prompt='The castle ' --length=1000

The prompt and the text go to stdout; a form feed separates several texts. A prompt is cleaned as
the run's text was. Without one, a run on documents starts a new document and stops at its end, and
another run continues a random passage of its training text. Flags default to the run's
config.sample. On a terminal control characters appear as escapes such as \\x1b.

--workdir=builtin is a small model in the package, trained on the manual of Python.

--no_copy counts a copy from its beginning in the prompt, if it reaches into the text. --best_of
keeps the text with the fewest bits per character.
"""

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
from absl import flags

from charlstm.cli import folders, options
from charlstm.errors import UserError, printable

STREAM_CHUNK = 16  # characters, few enough to follow --method=window
MAX_SAMPLES, MAX_COPY = 10**7, 10**4

WORKDIR = flags.DEFINE(
    options.ANY_PATH, "workdir", "", "the run folder; the last trained in runs/ if none"
)
CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "which weights")
PROMPT = flags.DEFINE_string("prompt", "", "the text to continue")
PROMPT_FILE = flags.DEFINE(options.LOCAL_PATH, "prompt_file", "", "a UTF-8 file with the prompt")
SETTINGS = options.define_settings(
    "sample",
    length="how many characters, the prompt not counted",
    temperature="0 takes the most probable character",
    top_k="sample from the k most probable; 0: all",
    top_p="sample from the smallest set with this probability; 1: all",
    min_p="drop characters below this share of the highest probability; 0: none",
    repetition_penalty="against long repetitions; 1 ends loops; 0: none",
    repetition_length="characters that may be repeated without a penalty",
    method="carry, one step per character, or window, a window for each",
)
NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", 1, "how many texts", lower_bound=1, upper_bound=MAX_SAMPLES
)
SEED = flags.DEFINE_integer(
    "seed", 0, "the same seed gives the same text", lower_bound=0, upper_bound=2**32 - 1
)
BEST_OF = flags.DEFINE_integer("best_of", 1, "keep the most probable of so many", 1, MAX_SAMPLES)
NO_COPY = flags.DEFINE_integer(
    "no_copy", 0, "longest verbatim copy of the training part; 0: any", 0, MAX_COPY
)
STOP = flags.DEFINE_string("stop", "", "end the text before this string, which is not printed")
ADAPT_TO = flags.DEFINE(
    options.ANY_PATH, "adapt_to", "", "a UTF-8 text for dynamic evaluation first"
)
STREAM = flags.DEFINE_boolean("stream", False, "print characters as they are generated")
STOP_AT_END = flags.DEFINE_boolean("stop_at_end", True, "stop where a document ends")
UNKNOWN = flags.DEFINE_enum(
    "unknown", "error", ["error", "drop", "replace"], "unknown characters of what it reads"
)
CHECK = flags.DEFINE_boolean("check", False, "count known words and copied spans, on stderr")
WORDS = flags.DEFINE(options.LOCAL_PATH, "words", "", "a UTF-8 list of known words for --check")
RAW = flags.DEFINE_boolean("raw", False, "print control characters to a terminal unchanged")


def show(text: str) -> None:
    """Print a piece of text at once."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() and not RAW.value else text)
    sys.stdout.flush()


def check_flags() -> None:
    """Raise UserError for flags that do not go together."""
    if WORDS.value and not CHECK.value:
        raise UserError(f"--words={WORDS.value}: needs --check")
    for flag in (NUM_SAMPLES, BEST_OF):
        if STREAM.value and flag.value > 1:
            raise UserError(f"--{flag.name}={flag.value}: --stream shows one text at a time")
    if NUM_SAMPLES.value > 1 and BEST_OF.value > 1:
        raise UserError(f"--num_samples={NUM_SAMPLES.value}: --best_of shows one text")


def main() -> None:
    """Write text as the flags say."""
    check_flags()
    changed = options.changed_settings("sample", *SETTINGS)
    prompt = options.read_text(PROMPT, PROMPT_FILE)
    listed = options.read_text_file(WORDS) if WORDS.value else ""
    from charlstm.evaluation import sample_check, writing  # they import JAX
    from charlstm.runs.checkpoints import load_model
    from charlstm.streaming import CHUNK_LEN

    workdir = folders.trained_workdir(WORKDIR.value)
    run, model, params = load_model(workdir, CHECKPOINT.value)
    length = 0 if STREAM.value else changed.get("length", run.config.sample.length)
    number = max(NUM_SAMPLES, BEST_OF, key=lambda flag: flag.value)
    writing.check_memory(run, len(prompt), number.value, length, number.name)
    train_M = sample_check.open_known_text(run) if CHECK.value else None
    if ADAPT_TO.value:
        params = writing.adapt_to_text(run, model, params, ADAPT_TO.value, UNKNOWN.value)
    holders: Any = NUM_SAMPLES, BEST_OF, SEED, UNKNOWN, NO_COPY, STOP, STOP_AT_END
    request = {holder.name: holder.value for holder in holders} | changed
    chunk = STREAM_CHUNK if STREAM.value else CHUNK_LEN
    result = writing.generate(run, model, params, prompt, chunk=chunk, **request)
    texts = (writing.show_stream if STREAM.value else writing.show_each)(result, run, show)
    show("\n")
    if train_M is not None:
        sample_check.log_report(texts, train_M, run.vocab, listed)


if __name__ == "__main__":
    app.run(main, "--prompt='The castle ' --length=500 --temperature=0.7")
