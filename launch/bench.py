"""Compare the speed and quality of this package with a Flax scan, torch and Keras.

  python launch/bench.py [--what=SECTION,...] [--quick]

step      a training step
growth    a training step over batch size, window, hidden size, layers and vocabulary (bench.png)
generate  generated characters per second
evaluate  evaluated characters per second
loop      launch/train.py as a whole, against its start-up and the training steps alone
entropy   bits per character on texts whose entropy rate is known exactly
quality   seconds to a number of held-out bits per character: the default recipe, the tutorial, and
          the tutorial in Keras, each for at most --minutes (quality.png)

Without --what all but quality. Each backend has a process of its own, and rounds alternate between
backends. The limit of a training step is the time of its matrix products, at the rate of one large
product. Tables go to stdout, all results to DIR/bench.json. --quick takes small sizes and few
rounds, and leaves out growth and entropy. torch and keras come with pip install -e '.[peers]'.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
import dataclasses
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

SECTIONS = ("step", "growth", "generate", "evaluate", "loop", "entropy", "quality")
BASELINES = ("torch", "keras")

WHAT = flags.DEFINE_list("what", None, f"sections: {', '.join(SECTIONS)}; none: all but quality")
MINUTES = flags.DEFINE_float("minutes", None, "limit of each training of quality")
TEXT = flags.DEFINE(options.ANY_PATH, "text", None, "a UTF-8 text for quality; none: Dracula")
SHAPES = flags.DEFINE_list(
    "shapes", None, "BxTxH of the training steps; other sections use the first"
)
REPEATS = flags.DEFINE_integer("repeats", None, "rounds of a comparison", lower_bound=1)
PEERS = flags.DEFINE_list("peers", ["auto"], "baselines: torch, keras, none, or auto for both")
OUT = flags.DEFINE(options.LOCAL_PATH, "out", "runs/bench", "folder for bench.json and pictures")
QUICK = flags.DEFINE_boolean("quick", False, "small sizes and few rounds")


def parse_names(flag: flags.FlagHolder, names: tuple[str, ...]) -> list[str]:
    """Return the names that a flag lists, in the order of `names`."""
    for name in flag.value:
        if name not in names:
            raise UserError(f"--{flag.name}={name}: must be of {', '.join(names)}")
    return [name for name in names if name in flag.value]


def parse_sections() -> list[str]:
    """Return the sections to measure."""
    left_out = ("growth", "entropy", "quality") if QUICK.value else ("quality",)
    sections = [name for name in SECTIONS if name not in left_out]
    if WHAT.value is not None:
        sections = parse_names(WHAT, SECTIONS)
    for flag in (MINUTES, TEXT):
        if flag.value is not None and "quality" not in sections:
            raise UserError(
                f"--{flag.name}={flag.value}: is for --what=quality, which is not given"
            )
    return sections


def parse_baselines() -> list[str]:
    """Return the baselines to compare with."""
    if PEERS.value == ["auto"]:
        return list(BASELINES)
    return [] if PEERS.value == ["none"] else parse_names(PEERS, BASELINES)


def parse_shape(word: str) -> tuple[int, ...]:
    """Return (B, T, H) of a word such as 32x50x256."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", word.strip()):
        raise UserError(f"--shapes={word}: must be BxTxH, such as 32x50x256")
    return tuple(map(int, word.split("x")))


def main() -> None:
    """Measure as the flags say."""
    sections, baselines = parse_sections(), parse_baselines()
    app.check_minutes(MINUTES.value)
    changes: dict[str, Any] = {
        "shapes": SHAPES.value and tuple(parse_shape(word) for word in SHAPES.value),
        "rounds": REPEATS.value,
        "minutes": MINUTES.value,
        "text": TEXT.value and find_source(TEXT.value, remedy="give --text=FILE").path,
    }
    out = folders.make_out(OUT.value, "bench.json", {"cpu", "settings"})
    from charlstm.bench import FULL, describe_machine, measure
    from charlstm.bench import QUICK as SMALL

    changes = {name: value for name, value in changes.items() if value}
    settings = dataclasses.replace(SMALL if QUICK.value else FULL, **changes)
    results = describe_machine() | {"settings": dataclasses.asdict(settings)}
    print(f"{results['cpu']}, {results['cpus']} CPUs, {results['platform']}")
    for section in sections:
        measurement = measure(section, settings, baselines)
        print(measurement)
        results[section] = measurement.data
        # After each section, so that an interrupted benchmark leaves its results.
        write_file(out / "bench.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
        for name, picture in measurement.pictures.items():
            write_file(out / name, picture)
    logger.info("all results: %s", out / "bench.json")


if __name__ == "__main__":
    app.run(main, "--quick --what=step")
