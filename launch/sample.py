"""Write new text with a trained run.

  python launch/sample.py --workdir=runs/default-pg345 --prompt='The castle ' --length=1000

With --adapt_to=FILE the model first reads that text and learns from it, and writes as it then is;
the run folder stays as it was.

A prompt is cleaned as the run's text was: its line ends become newlines, and config.data says the
rest, such as lower case. The text, after the prompt where one is given, goes to stdout and nothing
else does. A run that was trained on documents begins a new one where no prompt is given, and stops
at its end. Several texts are parted by a form feed. On a terminal control characters appear as
escapes such as \\x1b, unless --raw is given. Whatever is not given is as in the run's own
config.sample.

With --check the text is compared with the part of the run's text that it learnt from, and stderr
tells how many of its words stand there, and how much of it is copied. A word is a run of letters
with apostrophes inside, whatever their case; one at an end of the text, which may be cut off, does
not count. A copied run is as long as it can be. Both are exact, and take about a second for each
million characters of the run's text.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from absl import flags
from etils import epath

from charlstm.cli import folders, options
from charlstm.config_check import check_setting
from charlstm.data.encoding import decode
from charlstm.errors import UserError, printable

if TYPE_CHECKING:
    import numpy as np

    from charlstm.runs.checkpoints import Run

logger = logging.getLogger("charlstm.sample")

# Of --stream: a small piece even by the slow method, 2 ms a character, and far more than one can
# read by the other.
STREAM_CHUNK = 16
MAX_FILE_BYTES = 2**26  # of a prompt or a list of words
MAX_SAMPLES = 10**7  # at once; see check_memory for fewer
MAX_SHOWN = 10  # prompts from the training text

WORKDIR = flags.DEFINE(
    options.ANY_PATH, "workdir", "", "the run folder; the last trained in runs/ if none"
)
CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "which weights")
PROMPT = flags.DEFINE_string(
    "prompt", "", "the text to go on from; none: a new document, or else a place of the book"
)
PROMPT_FILE = flags.DEFINE(
    options.LOCAL_PATH, "prompt_file", "", "a UTF-8 file that holds the prompt"
)
LENGTH = flags.DEFINE_integer("length", None, "how many characters, the prompt not counted")
TEMPERATURE = flags.DEFINE_float("temperature", None, "0 takes the most probable character")
TOP_K = flags.DEFINE_integer("top_k", None, "choose among the k most probable; 0: all")
TOP_P = flags.DEFINE_float("top_p", None, "choose among those with this much probability; 1: all")
NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", 1, "how many texts", lower_bound=1, upper_bound=MAX_SAMPLES
)
SEED = flags.DEFINE_integer(
    "seed", 0, "the same seed gives the same text", lower_bound=0, upper_bound=2**32 - 1
)
METHOD = flags.DEFINE_enum(
    "method", None, ["carry", "window"], "one step a character, or reread a window for each"
)
ADAPT_TO = flags.DEFINE(
    options.ANY_PATH, "adapt_to", "", "a UTF-8 text to read, and learn from, first"
)
STREAM = flags.DEFINE_boolean("stream", False, "show characters as they are made")
STOP_AT_END = flags.DEFINE_boolean("stop_at_end", True, "stop where a document ends")
UNKNOWN = flags.DEFINE_enum(
    "unknown",
    "error",
    ["error", "drop", "replace"],
    "characters of the prompt, or of --adapt_to, that are not known",
)
CHECK = flags.DEFINE_boolean("check", False, "tell of words and copies, too, on stderr")
WORDS = flags.DEFINE(
    options.LOCAL_PATH, "words", "", "a UTF-8 list of words that --check knows, too"
)
RAW = flags.DEFINE_boolean("raw", False, "let control characters reach a terminal as they are")


def read_prompt() -> str:
    """Return the prompt that the flags give, '' for none."""
    if PROMPT.value and PROMPT_FILE.value:
        raise UserError("--prompt and --prompt_file: give one of them")
    if not PROMPT_FILE.value:
        return PROMPT.value
    prompt = read_file(PROMPT_FILE)
    if not prompt:
        raise UserError(f"--prompt_file={PROMPT_FILE.value}: is empty")
    return prompt


def read_file(flag: flags.FlagHolder) -> str:
    """Return the text of the file that `flag` names."""
    name = f"--{flag.name}={flag.value}"
    try:
        with open(os.path.expanduser(flag.value), "rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)  # some, such as /dev/zero, have no end
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}; give a UTF-8 file") from None
    if len(raw) > MAX_FILE_BYTES:
        raise UserError(f"{name}: has more than {MAX_FILE_BYTES:,} bytes; give a smaller file")
    return "".join(decode([raw], name))


def changed_settings() -> dict[str, Any]:
    """Return what the flags change of the run's config.sample, checked."""
    changed = {}
    for flag in (LENGTH, TEMPERATURE, TOP_K, TOP_P, METHOD):
        if flag.value is not None:
            try:
                check_setting(f"sample.{flag.name}", flag.value)
            except UserError as error:
                raise UserError(str(error).replace("config.sample.", "--")) from None
            changed[flag.name] = flag.value
    return changed


def check_memory(run: "Run", prompt: str, settings: dict[str, Any]) -> None:
    """Raise UserError if so many texts cannot be in memory at once."""
    from charlstm.runs.machine import memory_bytes
    from charlstm.sampling import SIZE

    model, length = run.config.model, settings["length"]
    # A tenth less than measured, of which text and the pieces of SIZE characters are the most.
    numbers = len(prompt) + 9 * SIZE + 2 * len(run.vocab)
    numbers += 6 * model.num_layers * model.hidden_size
    numbers += 0 if STREAM.value else 5 * length
    needed = 4 * numbers * NUM_SAMPLES.value
    if needed > (there := memory_bytes()):
        raise UserError(
            f"--num_samples={NUM_SAMPLES.value} --length={length}: so much text takes at least "
            f"{needed / 2**30:,.0f} GiB of memory, and there are {there / 2**30:,.0f}; give less "
            "at a time, with another --seed each time"
        )


def encode_prompts(run: "Run", prompt: str, method: str) -> tuple[list["np.ndarray"], str]:
    """Return the ids that each text goes on from, and what to print before what is made."""
    import numpy as np

    from charlstm.data.cleaning import END

    if prompt:
        ids_P = run.encode(prompt, UNKNOWN.value)
        if len(ids_P) == 0:
            raise UserError("the prompt has no character that the model knows; give another one")
        if method == "window" and len(ids_P) < run.config.seq_len:
            raise UserError(
                f"--method=window needs a prompt of at least {run.config.seq_len} characters, and "
                f"this one has {len(ids_P)}; give a longer one, or use --method=carry"
            )
        return [ids_P] * NUM_SAMPLES.value, run.decode(ids_P)
    if run.config.data.document_separator and method == "carry":
        return [run.vocab.encode(END)] * NUM_SAMPLES.value, ""
    chosen = np.random.default_rng(SEED.value).integers(len(run.prompts), size=NUM_SAMPLES.value)
    for index in chosen[:MAX_SHOWN]:
        prompt = run.decode(run.vocab.encode(run.prompts[index]))
        logger.info("from the training text: %r", prompt)
    if len(chosen) > MAX_SHOWN:
        logger.info("and from %s other places", f"{len(chosen) - MAX_SHOWN:,}")
    return [run.vocab.encode(run.prompts[index]) for index in chosen], ""


def adapted(run: "Run", model: Any, params: Any) -> Any:
    """Return the params of a model that has read --adapt_to, and learnt from it: see dynamic.py."""
    from charlstm.data.corpus import open_corpus
    from charlstm.evaluation.dynamic import adapt, make_anchor

    text = open_corpus(
        run.config.data,
        ADAPT_TO.value,
        vocab=run.vocab,
        unknown=UNKNOWN.value,
        remedy="give --adapt_to=FILE, a UTF-8 text",
    )
    if len(text.ids_M) < 2:
        raise UserError(
            f"--adapt_to={ADAPT_TO.value}: one character is nothing to learn from; give more"
        )
    logger.info("reading %s characters of %s", f"{len(text.ids_M):,}", ADAPT_TO.value)
    anchor = make_anchor(model, params, [run.vocab.encode(prompt) for prompt in run.prompts])
    return adapt(model, anchor, text.ids_M)


def shown(text: str) -> str:
    """Return `text` as it may go to stdout: a terminal would obey its control characters."""
    return printable(text) if sys.stdout.isatty() and not RAW.value else text


def write(
    run: "Run", opening: str, pieces: Iterable["np.ndarray"], end_id: int | None
) -> list["np.ndarray"]:
    """Write what comes in pieces ids_BT to stdout, and return the ids_L of each text."""
    import numpy as np

    from charlstm.sampling import before_end

    if STREAM.value:
        made = [np.zeros(0, np.int32)]
        sys.stdout.write(shown(opening))
        for ids_1T in pieces:
            made.append(before_end(ids_1T[0], end_id))
            sys.stdout.write(shown(run.decode(made[-1])))
            sys.stdout.flush()
        texts = [np.concatenate(made)]
    else:
        texts = [before_end(ids_L, end_id) for ids_L in np.concatenate(list(pieces), axis=1)]
        sys.stdout.write("\n\f\n".join(shown(opening + run.decode(ids_L)) for ids_L in texts))
    sys.stdout.write("\n")
    sys.stdout.flush()
    return texts


def main() -> None:
    """Write as the flags say."""
    if WORDS.value and not CHECK.value:
        raise UserError(f"--words={WORDS.value}: is for --check, which is not given")
    if STREAM.value and NUM_SAMPLES.value > 1:
        raise UserError(f"--num_samples={NUM_SAMPLES.value}: --stream shows one text at a time")
    prompt, changed = read_prompt(), changed_settings()
    listed = read_file(WORDS) if WORDS.value else ""
    from charlstm.evaluation.memorization import words
    from charlstm.evaluation.sample_check import open_training_part, report
    from charlstm.keys import derive_key
    from charlstm.runs.checkpoints import load_model
    from charlstm.runs.folder import load_run
    from charlstm.sampling import SIZE, stream, until_end

    workdir = folders.trained_workdir(WORKDIR.value)
    run = load_run(epath.Path(workdir))
    settings = run.config.sample.to_dict() | changed
    check_memory(run, prompt, settings)
    run, model, params = load_model(workdir, CHECKPOINT.value)
    train_M = open_training_part(run) if CHECK.value else None
    if ADAPT_TO.value:
        params = adapted(run, model, params)
    prompts, opening = encode_prompts(run, prompt, settings["method"])
    settings |= {"seq_len": run.config.seq_len, "chunk": STREAM_CHUNK if STREAM.value else SIZE}
    end_id = model.end_id if STOP_AT_END.value else None
    key = derive_key(run.key(SEED.value), "sample")
    pieces = stream(model, params, prompts, key, **settings)
    made = write(run, opening, until_end(pieces, end_id), end_id)
    if train_M is not None:
        for line in report(made, train_M, run.vocab, set(words(listed))):
            logger.info(line)


if __name__ == "__main__":
    app.run(main, "--prompt='The castle ' --length=500 --temperature=0.7")
