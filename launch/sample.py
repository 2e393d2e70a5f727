"""Write text with a trained run.

  python launch/sample.py --workdir=runs/default-pg345 --prompt='The castle ' --length=1000

The prompt and the text go to stdout; a form feed separates several texts. A prompt is cleaned as
the run's text was. Without one, a run on documents starts a new document and stops at its end, and
another run continues a random passage of its training text. Flags default to the run's
config.sample. On a terminal control characters appear as escapes such as \\x1b.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
from absl import flags
from etils import epath

from charlstm.cli import folders, options
from charlstm.errors import UserError, printable

STREAM_CHUNK = 16  # characters, few enough to follow --method=window
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
CHECK = flags.DEFINE_boolean("check", False, "count known words and copied spans, on stderr")
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


def show(text: str) -> None:
    """Print a piece of text at once."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() and not RAW.value else text)
    sys.stdout.flush()


def main() -> None:
    """Write text as the flags say."""
    if WORDS.value and not CHECK.value:
        raise UserError(f"--words={WORDS.value}: needs --check")
    if STREAM.value and NUM_SAMPLES.value > 1:
        raise UserError(f"--num_samples={NUM_SAMPLES.value}: --stream shows one text at a time")
    changed = options.changed_settings("sample", LENGTH, TEMPERATURE, TOP_K, TOP_P, METHOD)
    prompt, listed = read_prompt(), options.read_text_file(WORDS) if WORDS.value else ""
    from charlstm.evaluation import sample_check, writing  # they import JAX
    from charlstm.runs.checkpoints import load_model
    from charlstm.runs.folder import load_run
    from charlstm.sampling import CHUNK_LEN

    workdir = folders.trained_workdir(WORKDIR.value)
    run = load_run(epath.Path(workdir))
    length = 0 if STREAM.value else changed.get("length", run.config.sample.length)
    writing.check_memory(run, len(prompt), NUM_SAMPLES.value, length)
    run, model, params = load_model(workdir, CHECKPOINT.value)
    train_M = sample_check.open_training_part(run) if CHECK.value else None
    if ADAPT_TO.value:
        params = writing.adapt_to_text(run, model, params, ADAPT_TO.value, UNKNOWN.value)
    holders: tuple[flags.FlagHolder, ...] = (NUM_SAMPLES, SEED, UNKNOWN, STOP_AT_END)
    request = {holder.name: holder.value for holder in holders} | changed
    chunk = STREAM_CHUNK if STREAM.value else CHUNK_LEN
    result = writing.generate(run, model, params, prompt, chunk=chunk, **request)
    texts = (writing.show_stream if STREAM.value else writing.show_each)(result, run, show)
    show("\n")
    if train_M is not None:
        sample_check.log_report(texts, train_M, run.vocab, listed)


if __name__ == "__main__":
    app.run(main, "--prompt='The castle ' --length=500 --temperature=0.7")
