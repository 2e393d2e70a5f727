"""Show how much a text surprises a trained run, by line, word or character.

  python launch/score.py --workdir=runs/default-pg345 FILE ... [--by=word] [--rank]

The surprise of a character is -log2 of its probability given all characters before it: its bits. A
FILE is a text, a folder of texts or a pattern; each text is read once, from an empty state. Its
first character is not predicted, and by a run on windows its first window. Without FILE, or for -,
standard input is read as a stream: each line is shown as soon as it has been read.

A line includes its newline, and a word the white space that ends it. --rank sorts the lines of each
text by bits per character, words and characters by bits, the most surprising first. Places are
those in the text as the model reads it: cleaned as the run's text was, and without Project
Gutenberg's header, which a stream keeps.

--format=json prints one object, for a stream one object per line. --format=html writes a page to
--out, coloured by surprise, with what the model expected at each character.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from absl import flags
from etils import epath

from charlstm.cli import folders, options, signals
from charlstm.errors import UserError
from charlstm.files import new_file, temporary_name

logger = logging.getLogger("charlstm.score")

WORKDIR = flags.DEFINE(
    options.ANY_PATH, "workdir", "", "the run folder; the last trained in runs/ if none"
)
CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "which weights")
BY = flags.DEFINE_enum("by", "line", ["char", "word", "line"], "what to sum up")
RANK = flags.DEFINE_boolean("rank", False, "the most surprising first")
FORMAT = flags.DEFINE_enum("format", "table", ["table", "json", "tsv", "html"], "how to show it")
OUT = flags.DEFINE(options.LOCAL_PATH, "out", "", "the file to write; standard output if none")
UNKNOWN = flags.DEFINE_enum(
    "unknown", "error", ["error", "drop", "replace"], "unknown characters of the texts"
)


def check_flags() -> None:
    """Raise UserError for flags that make no sense."""
    if FORMAT.value == "html" and not OUT.value:
        raise UserError("--format=html: needs --out=FILE for the page")
    if FORMAT.value == "html" and RANK.value:
        raise UserError("--rank: a page has its own ranking; leave it out, or --format=html")


@contextmanager
def opened_out() -> Iterator[Callable[[str], Any]]:
    """Yield write(text) for --out."""
    if OUT.value:
        path = epath.Path(OUT.value)
        temporary = path.parent / temporary_name(path.name)
        signals.cleanups.append(partial(temporary.unlink, missing_ok=True))
        with new_file(path) as write:
            yield write
    else:
        yield sys.stdout.write


def main(paths: list[str]) -> None:
    """Score the texts as the flags say."""
    check_flags()
    workdir = folders.trained_workdir(WORKDIR.value)
    from charlstm.evaluation import score, score_formats  # they import JAX
    from charlstm.pages.embed import check_out
    from charlstm.pages.score import write_score_page
    from charlstm.runs.checkpoints import load_model

    is_page = FORMAT.value == "html"
    if is_page:
        check_out(OUT.value)  # before the texts are read
    sources = score.find_texts(paths or [score.STANDARD_INPUT])
    run, model, params = load_model(workdir, CHECKPOINT.value)
    is_stream = None in sources
    if is_stream and os.isatty(0):
        logger.info("reading the terminal; end the text with Ctrl-D")
    num_top = score.NUM_TOP if is_page or BY.value == "char" else 1
    stdin = open(0, "rb", buffering=0, closefd=False)
    texts = score.score_texts(
        run, model, params, sources, stdin, unknown=UNKNOWN.value, num_top=num_top
    )
    if is_page:
        write_score_page(texts, run, BY.value, OUT.value)
        return
    formats = {
        "table": score_formats.write_table,
        "tsv": score_formats.write_tsv,
        "json": score_formats.write_json_lines if is_stream else score_formats.write_json,
    }
    with opened_out() as write:
        formats[FORMAT.value](texts, run, BY.value, RANK.value, write)


if __name__ == "__main__":
    app.run(main, "--by=word --rank letter.txt", takes_files=True)
