"""Measure this package next to its Flax twin and, where installed, torch and Keras.

  python launch/bench.py [--what=SECTION,...] [--quick]

Sections: step, growth, generate, evaluate, startup, loop, entropy, quality. Without --what all but
quality, which takes an hour.

Every contender has a process of its own, and their repeats alternate; ratios are medians over
rounds. The limit is the time of the matrix products at the rate of one large product measured in
the same rounds. Tables go to stdout, all figures to DIR/bench.json, pictures to DIR. The peers come
with pip install -e '.[peers]'. --quick takes a minute, leaves out growth, startup and entropy, and
its figures are rough.

entropy trains on sources of known entropy rate. quality measures how soon the default recipe, the
tutorial here and the tutorial in Keras reach a number of bits per character on the last tenth of
Dracula, or of --text. They train one after another for --minutes at most.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
import datetime
import importlib.metadata
import importlib.util
import json
import logging
import platform
import re
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from charlstm.bench.sections import FULL, QUICK, Bench, Settings, Shape
from charlstm.cli import folders, options
from charlstm.data.sources import find_source
from charlstm.errors import UserError
from charlstm.files import write_file

logger = logging.getLogger("charlstm.bench")

SECTIONS = ("step", "growth", "generate", "evaluate", "startup", "loop", "entropy", "quality")
LONG_SECTIONS = ("growth", "startup", "entropy", "quality")
PEERS = ("torch", "keras")
INSTALL = "pip install -e '.[peers]'"

WHAT = flags.DEFINE_list(
    "what", None, f"what to measure, of {', '.join(SECTIONS)}; none: all but quality"
)
MINUTES = flags.DEFINE_float("minutes", None, "how long each contender of quality trains at most")
TEXT = flags.DEFINE(
    options.ANY_PATH, "text", None, "what quality learns from, UTF-8; none: Dracula"
)
SHAPES = flags.DEFINE_list("shapes", None, "BxTxH of each training step to measure")
BASE = flags.DEFINE_string("base", None, "BxTxH of all other sections; generate takes H only")
TEXTS = flags.DEFINE_list("texts", None, "how many texts to write at once")
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", None, "V", lower_bound=2)
NUM_LAYERS = flags.DEFINE_integer("num_layers", None, "N", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", None, "rounds of a comparison", lower_bound=1)
LOOP_STEPS = flags.DEFINE_integer("loop_steps", None, "steps of the loop", lower_bound=2)
PEERS_FLAG = flags.DEFINE_list("peers", ["auto"], "torch, keras, none, or auto: what is installed")
OUT = flags.DEFINE(
    options.LOCAL_PATH, "out", "runs/bench", "the folder for bench.json and pictures"
)
QUICK_FLAG = flags.DEFINE_boolean("quick", False, "small shapes and few repeats")


def parse_settings() -> Settings:
    """Return what the flags ask for, checked."""
    app.check_minutes(MINUTES.value)
    given: dict[str, Any] = {
        "shapes": SHAPES.value and tuple(parse_shape("shapes", word) for word in SHAPES.value),
        "base": BASE.value and parse_shape("base", BASE.value),
        "minutes": MINUTES.value,
        "text": TEXT.value and find_source(TEXT.value, remedy="give --text=FILE").path,
        "texts": TEXTS.value and tuple(parse_count("texts", word) for word in TEXTS.value),
    }
    for flag in (VOCAB_SIZE, NUM_LAYERS, REPEATS, LOOP_STEPS):
        given[flag.name] = flag.value
    settings = QUICK if QUICK_FLAG.value else FULL
    return settings._replace(**{name: value for name, value in given.items() if value})


def parse_shape(flag: str, word: str) -> Shape:
    """Return (B, T, H) of a word such as 32x50x256."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", word.strip())
    if match is None:
        raise UserError(f"--{flag}={word}: must be BxTxH, such as 32x50x256")
    batch_size, seq_len, hidden_size = map(int, match.groups())
    return batch_size, seq_len, hidden_size


def parse_count(flag: str, word: str) -> int:
    """Return a number above 0."""
    if not re.fullmatch(r"[1-9]\d*", word.strip()):
        raise UserError(f"--{flag}={word}: must be whole numbers above 0, such as 1,64")
    return int(word)


def parse_sections() -> list[str]:
    """Return the sections that --what names, or those that are measured without it."""
    left_out = LONG_SECTIONS if QUICK_FLAG.value else ("quality",)
    named = [name for name in SECTIONS if name not in left_out]
    if WHAT.value is not None:
        for name in WHAT.value:
            if name not in SECTIONS:
                raise UserError(f"--what={name}: must be of {', '.join(SECTIONS)}")
        named = [name for name in SECTIONS if name in WHAT.value]
    for flag in (MINUTES, TEXT):
        if flag.value is not None and "quality" not in named:
            raise UserError(
                f"--{flag.name}={flag.value}: is for --what=quality, which is not given"
            )
    return named


def parse_peers() -> tuple[str, ...]:
    """Return the peers that the flag names, or those that are installed."""
    installed = tuple(name for name in PEERS if importlib.util.find_spec(name))
    if PEERS_FLAG.value == ["auto"] and QUICK_FLAG.value:
        return tuple(name for name in installed if name != "keras")  # it compiles for long
    if PEERS_FLAG.value == ["auto"]:
        missing = ", ".join(name for name in PEERS if name not in installed)
        if missing:
            logger.info("not installed, so not compared: %s; they come with %s", missing, INSTALL)
        return installed
    if PEERS_FLAG.value == ["none"]:
        return ()
    for name in PEERS_FLAG.value:
        if name not in PEERS:
            raise UserError(f"--peers={name}: must be auto, none, or of {', '.join(PEERS)}")
        if name not in installed:
            raise UserError(f"--peers={name}: not installed; {INSTALL}")
    return tuple(name for name in PEERS if name in PEERS_FLAG.value)


def describe_machine(peers: tuple[str, ...]) -> dict[str, Any]:
    """Return what bench.json says of the machine and of the versions on it."""
    packages = ("charlstm", "jax", "jaxlib", "flax", "optax", "numpy", *peers)
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def cpu_model() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).split(": ")[1]
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Measure as the flags say."""
    sections = parse_sections()
    settings, peers = parse_settings(), parse_peers()
    out = folders.make_out(OUT.value, "bench.json", {"cpu", "settings"})
    # A file or a pipe has no width.
    is_terminal = sys.stdout.isatty()  # whatever FORCE_COLOR says
    width = shutil.get_terminal_size().columns if is_terminal else 110
    console = Console(force_terminal=is_terminal, width=width, highlight=False, markup=False)
    report = describe_machine(peers) | {"settings": settings._asdict()}
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    for line in (f"{report['cpu']}, {report['cpus']} CPUs, {report['platform']}", versions):
        console.print(line, soft_wrap=True)
    if report["load_before"] > 0.5:
        logger.warning("the machine is busy (load %.1f): figures vary", report["load_before"])
    with closing(Bench(settings, peers, console, about=report["cpu"])) as bench:
        for section in sections:
            report[section] = getattr(bench, section)()
            # Written after each, so that an end half-way leaves what there is.
            text = json.dumps(report, indent=1, allow_nan=False)
            write_file(out / "bench.json", text + "\n")
            for name, picture in bench.pictures.items():
                write_file(out / name, picture)
    logger.info("all figures: %s", out / "bench.json")


if __name__ == "__main__":
    app.run(main, "--quick --what=step")
