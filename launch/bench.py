"""Compare the speed and quality of this package with a Flax scan, torch and Keras.

  python launch/bench.py [--what=SECTION,...] [--quick]

step      a training step
growth    a training step over batch, window and hidden size, layers and vocabulary (bench.png)
generate  generation of text
evaluate  evaluation of a held-out text
loop      launch/train.py as a whole, against its start-up and the training steps alone
serve     launch/serve.py over HTTP: time to the first character, characters per second, memory
entropy   bits per character on texts whose entropy rate is known exactly
quality   seconds to a number of held-out bits per character: the default recipe, the tutorial, and
          the tutorial in Keras, each for at most --minutes (quality.png)

Without --what all but quality. Each backend has a process of its own, and rounds alternate between
backends. 'charlstm', 'fused' and 'flax' are plain LSTMs with the default and two other recurrences,
'default' is the default recipe, 'products' a large matrix product with as many operations as those
of 'charlstm', which limits its speed. Tables go to stdout, all results to DIR/bench.json. --quick
takes small sizes and leaves out growth, serve and entropy. pip install -e '.[peers]' for the peers.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
import dataclasses
import importlib.util
import json
import logging
import re
from typing import Any

from absl import flags

from charlstm.cli import folders, options
from charlstm.data.sources import find_source
from charlstm.errors import UserError
from charlstm.files import write_file

logger = logging.getLogger("charlstm.bench")

SECTIONS = ("step", "growth", "generate", "evaluate", "loop", "serve", "entropy", "quality")
BASELINES = ("torch", "keras")

WHAT = flags.DEFINE_list("what", None, f"sections: {', '.join(SECTIONS)}; none: all but quality")
MINUTES = flags.DEFINE_float("minutes", None, "limit of each training of quality")
TEXT = flags.DEFINE(options.ANY_PATH, "text", None, "a UTF-8 text for quality; none: Dracula")
SHAPES = flags.DEFINE_list("shapes", None, "BxTxH of training steps; other sections use the first")
REPEATS = flags.DEFINE_integer("repeats", None, "rounds of a comparison", lower_bound=1)
PEERS = flags.DEFINE_list("peers", [*BASELINES], "baselines: torch, keras; or none")
OUT = flags.DEFINE(options.LOCAL_PATH, "out", "runs/bench", "folder for bench.json and pictures")
QUICK = flags.DEFINE_boolean("quick", False, "small sizes and few rounds")


def check_names(flag: flags.FlagHolder, allowed: tuple[str, ...]) -> None:
    """Raise UserError if a flag lists a name that is not allowed."""
    for name in flag.value or ():
        if name not in allowed:
            raise UserError(f"--{flag.name}={name}: must be of {', '.join(allowed)}")


def parse_sections() -> list[str]:
    """Return the sections to measure."""
    check_names(WHAT, SECTIONS)
    left_out = ("growth", "serve", "entropy", "quality") if QUICK.value else ("quality",)
    default = [name for name in SECTIONS if name not in left_out]
    sections = [name for name in SECTIONS if name in WHAT.value] if WHAT.value else default
    for flag in (MINUTES, TEXT):
        if flag.value is not None and "quality" not in sections:
            raise UserError(f"--{flag.name}={flag.value}: needs --what=quality")
    return sections


def parse_shape(word: str) -> tuple[int, ...]:
    """Return (B, T, H) of a word such as 32x50x256."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", word):
        raise UserError(f"--shapes={word}: must be BxTxH, such as 32x50x256")
    return tuple(map(int, word.split("x")))


def installed_baselines() -> list[str]:
    """Return the baselines to compare with, and log a warning for each that is not installed."""
    check_names(PEERS, (*BASELINES, "none"))
    names = [name for name in BASELINES if name in PEERS.value]
    missing = [name for name in names if not importlib.util.find_spec(name)]
    for name in missing:
        logger.warning("%s: not installed; pip install -e '.[peers]'", name)
    return [name for name in names if name not in missing]


def main() -> None:
    """Measure as the flags say."""
    sections = parse_sections()
    options.check_minutes(MINUTES.value)
    flagged: dict[str, Any] = {"rounds": REPEATS.value, "minutes": MINUTES.value}
    flagged["shapes"] = tuple(map(parse_shape, SHAPES.value or ()))
    flagged["text"] = TEXT.value and find_source(TEXT.value, remedy="give --text=FILE").path
    baselines = installed_baselines()
    out = folders.make_out(OUT.value, "bench.json", {"cpu", "settings"})
    from charlstm import bench

    changes = {name: value for name, value in flagged.items() if value}
    settings = dataclasses.replace(bench.QUICK if QUICK.value else bench.FULL, **changes)
    report = bench.describe_machine(baselines) | {"settings": dataclasses.asdict(settings)}
    for section in sections:
        measurement = bench.measure(section, settings, baselines)
        print(f"{section}\n{measurement}\n")
        report[section] = measurement.results
        # After each section, so that an interrupted benchmark leaves its results.
        write_file(out / "bench.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
        for name, picture in measurement.pictures.items():
            write_file(out / name, picture)
    logger.info("all results: %s", out / "bench.json")


if __name__ == "__main__":
    app.run(main, "--quick --what=step")
