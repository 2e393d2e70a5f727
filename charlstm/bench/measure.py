"""Measure the sections of the benchmark."""

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from charlstm.bench.cases import Case, Checkpoints
from charlstm.bench.command import run_training, write_random_text
from charlstm.bench.entropy import known_sources
from charlstm.bench.report import quality_picture, size_picture, table
from charlstm.bench.time_to_quality import measure_recipes
from charlstm.bench.timing import BASELINES, LIMIT, call, open_processes, time_interleaved

logger = logging.getLogger("charlstm.bench")

SECTIONS = ("step", "growth", "generate", "evaluate", "loop", "entropy", "quality")
OURS = ("charlstm", "flax", "default")
HELD_OUT_CHARS = 85_000  # read by evaluate
GENERATED_CHARS = 200
LAYERS = (1, 2, 4)


@dataclass(frozen=True)
class Settings:
    """Sizes and durations of the measurements."""

    # (B, T, H) of training steps. All other sections use the first.
    shapes: Sequence[tuple[int, int, int]] = (
        (16, 100, 256),
        (32, 50, 256),
        (128, 100, 256),
        (64, 64, 512),
        (32, 64, 512),
    )
    batch_sizes: Sequence[int] = (1, 8, 64, 256)  # for generate
    rounds: int = 9
    round_seconds: float = 0.25  # timers and waking threads take much less
    commands: int = 3  # rounds of loop
    loop_steps: int = 1000
    factors: Sequence[float] = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)  # of each size, for growth
    small_sources: bool = False  # for entropy
    minutes: float = 30.0  # for quality: limit of each training
    text: str = ""  # for quality: a path; '' is Dracula


FULL = Settings()
QUICK = Settings(
    shapes=((16, 50, 128),),
    batch_sizes=(1,),
    rounds=3,
    round_seconds=0.05,
    commands=1,
    loop_steps=100,
    factors=(1 / 4, 1),
    small_sources=True,
    minutes=1.0,
)


@dataclass(frozen=True)
class Measurement:
    """Results of one section, ready for JSON. `str` gives a table."""

    results: list[dict[str, Any]]
    pictures: dict[str, bytes] = field(default_factory=dict)  # PNGs by file name

    def __str__(self) -> str:
        return table(self.results)


def measure(
    what: str, settings: Settings = FULL, baselines: Sequence[str] = BASELINES
) -> Measurement:
    """Measure one section of the benchmark.

    Every backend runs in a process of its own, which imports the main module again; a script that
    calls this function needs `if __name__ == "__main__":`.

    Args:
      what: one of SECTIONS.
      settings: sizes and durations.
      baselines: 'torch', 'keras' or both. If one is not installed or fails, its result is an error.

    Raises:
      RunError: if launch/train.py fails.
      UserError: if settings.text cannot be read.
    """
    if what == "loop":
        return measure_loop(settings)
    if what == "entropy":
        return measure_entropy(settings)
    if what == "quality":
        recipes = measure_recipes(settings.text, 60 * settings.minutes, "keras" in baselines)
        return Measurement(recipes, {"quality.png": quality_picture(recipes)})
    return measure_speed(what, settings, baselines)


def measure_speed(what: str, settings: Settings, baselines: Sequence[str]) -> Measurement:
    """Time training steps, also over each size ('growth'), generation or evaluation."""
    base = Case("train", *settings.shapes[0])
    windows = max(1, HELD_OUT_CHARS // base.characters)
    cases = {
        "step": [Case("train", *shape) for shape in settings.shapes],
        "growth": growth_cases(base, settings.factors),
        "generate": [
            Case("generate", batch_size, GENERATED_CHARS, base.hidden_size)
            for batch_size in settings.batch_sizes
        ],
        "evaluate": [base._replace(task="evaluate", num_windows=windows)],
    }[what]
    names = [*OURS, *baselines, *([LIMIT] if cases[0].task == "train" else [])]
    if what in ("growth", "evaluate"):  # Keras compiles for long, and cannot evaluate streams
        names = [name for name in names if name != "keras"]
    # New processes for each case, because peak memory is per process; growth has too many cases.
    groups = [cases] if what == "growth" else [[case] for case in cases]
    results = []
    for group in groups:
        with open_processes(names) as processes:
            results += [row for case in group for row in time_case(processes, case, settings)]
    pictures = {"bench.png": size_picture(results, base)} if what == "growth" else {}
    return Measurement(results, pictures)


def time_case(
    processes: Mapping[str, Executor], case: Case, settings: Settings
) -> list[dict[str, Any]]:
    """Time each backend on `case`."""
    logger.info("%s", case)
    return time_interleaved(processes, case, settings.rounds, settings.round_seconds)


def growth_cases(base: Case, factors: Sequence[float]) -> list[Case]:
    """Return `base` and the cases that differ from it in one size."""
    cases = [base, *(base._replace(num_layers=num_layers) for num_layers in LAYERS)]
    for size in ("batch_size", "seq_len", "hidden_size", "vocab_size"):
        for factor in factors:
            # Vocabularies range from dozens (English) to thousands (Chinese).
            factor = factor**2 if size == "vocab_size" and factor > 1 else factor
            cases.append(base._replace(**{size: max(2, round(getattr(base, size) * factor))}))
    return list(dict.fromkeys(cases))


def measure_loop(settings: Settings) -> Measurement:
    """Time launch/train.py against a run of one step and the other steps alone.

    In the first round the run of one step compiles; later ones load what it has compiled. The last
    result has the medians over rounds.
    """
    case, steps, rounds = Case("train", *settings.shapes[0]), settings.loop_steps, []
    with open_processes(["default"]) as processes, TemporaryDirectory() as folder:
        text = write_random_text(Path(folder, "text.txt"), case)
        for index in range(settings.commands):
            timings = time_case(processes, case, settings)
            with open_processes(["command"]) as commands:
                submit = commands["command"].submit
                startup, _ = submit(run_training, case, text, 1).result()
                seconds, peak = submit(run_training, case, text, steps).result()
            timings += time_case(processes, case, settings)
            step_ms = statistics.median(ms for each in timings for ms in each["ms"])
            bare = (steps - 1) * step_ms / 1000
            rounds.append(
                {
                    "round": str(index + 1),
                    "command_seconds": seconds,
                    "startup_seconds": startup,
                    "bare_seconds": bare,
                    "command_over_startup_and_bare": seconds / (startup + bare),
                    "peak_mib": peak,
                }
            )
    keys = list(rounds[0])[1:]
    medians = {key: statistics.median(each[key] for each in rounds) for key in keys}
    return Measurement([*rounds, {"round": "median"} | medians])


def measure_entropy(settings: Settings) -> Measurement:
    """Train on texts of known entropy rate, and compare the held-out bits per character with it."""
    results = []
    for source, config in known_sources(settings.small_sources):
        logger.info("entropy: %s, %d steps", source.name, config.num_steps)
        with open_processes(["jax"]) as processes:
            task = "jax_backend.train", config.to_dict(), Checkpoints(time.time()), source
            last = processes["jax"].submit(call, *task).result()[-1]
        excess = last["bits_per_char"] / source.entropy_rate - 1
        about = {"source": source.name, "vocab_size": source.vocab_size}
        results.append(about | {"entropy_rate": source.entropy_rate, "excess": excess} | last)
    return Measurement(results)
