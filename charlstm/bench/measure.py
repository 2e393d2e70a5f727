"""Measure the sections of the benchmark."""

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from charlstm.bench import time_to_quality
from charlstm.bench.cases import Case, Checkpoints
from charlstm.bench.command import cpu_model, run_training, write_random_text
from charlstm.bench.entropy import known_sources
from charlstm.bench.report import size_picture, table, timing_rows
from charlstm.bench.timing import (
    BASELINES,
    LIMIT,
    call,
    open_processes,
    summarize,
    time_interleaved,
)

logger = logging.getLogger("charlstm.bench")

OURS = ("charlstm", "flax", "default")
HELD_OUT_CHARS = 85_000  # read by evaluate
GENERATED_CHARS = 200
LAYERS = (1, 2, 4)


@dataclass(frozen=True)
class Settings:
    """Sizes and durations of the measurements."""

    # (B, T, H) of training steps. All other sections use the first.
    shapes: tuple[tuple[int, int, int], ...] = (
        (16, 100, 256),
        (32, 50, 256),
        (128, 100, 256),
        (64, 64, 512),
        (32, 64, 512),
    )
    batch_sizes: tuple[int, ...] = (1, 8, 64, 256)  # for generate
    rounds: int = 9
    round_seconds: float = 0.25  # timers and waking threads take much less
    commands: int = 3  # rounds of loop
    loop_steps: int = 1000
    factors: tuple[float, ...] = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)  # of each size, for growth
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
    """Results of one section. `str` gives a table."""

    data: Any  # for JSON
    table: str
    pictures: dict[str, bytes] = field(default_factory=dict)  # PNGs by file name

    def __str__(self) -> str:
        return self.table


def measure(
    what: str, settings: Settings = FULL, baselines: Sequence[str] = BASELINES
) -> Measurement:
    """Measure one section of the benchmark.

    Every backend runs in a process of its own, which imports the main module again; a script that
    calls this function needs `if __name__ == "__main__":`.

    Args:
      what: a key of SECTIONS.
      settings: sizes and durations.
      baselines: 'torch', 'keras' or both. If one is not installed or fails, its result is an error.

    Raises:
      RunError: if launch/train.py fails.
      UserError: if settings.text cannot be read.
    """
    return SECTIONS[what](settings, baselines)


def measure_step(settings: Settings, baselines: Sequence[str]) -> Measurement:
    """Time a training step."""
    cases = [Case("train", *shape) for shape in settings.shapes]
    return _time_cases([*OURS, *baselines, LIMIT], cases, settings)


def measure_generation(settings: Settings, baselines: Sequence[str]) -> Measurement:
    """Time the generation of text, character by character."""
    hidden_size = settings.shapes[0][2]
    cases = [Case("generate", b, GENERATED_CHARS, hidden_size) for b in settings.batch_sizes]
    return _time_cases([*OURS, *baselines], cases, settings)


def measure_evaluation(settings: Settings, baselines: Sequence[str]) -> Measurement:
    """Time the evaluation of a held-out text."""
    batch_size, seq_len, hidden_size = settings.shapes[0]
    num_windows = max(1, HELD_OUT_CHARS // (batch_size * seq_len))
    case = Case("evaluate", batch_size, seq_len, hidden_size, num_windows=num_windows)
    return _time_cases([*OURS, *_without_keras(baselines)], [case], settings)


def _without_keras(baselines: Sequence[str]) -> list[str]:
    # It has no stateful evaluation of one long text, and takes long to compile.
    return [name for name in baselines if name != "keras"]


def _time_cases(names: Sequence[str], cases: Sequence[Case], settings: Settings) -> Measurement:
    results = []
    for case in cases:
        with open_processes(names) as processes:  # new ones, because peak memory is per process
            results.append(_time_case(processes, case, settings))
    return Measurement(results, table(timing_rows(results)))


def _time_case(processes: Mapping[str, Executor], case: Case, settings: Settings) -> dict[str, Any]:
    logger.info("%s", case)
    return summarize(
        *time_interleaved(processes, case, settings.rounds, settings.round_seconds), case
    )


def measure_growth(settings: Settings, baselines: Sequence[str]) -> Measurement:
    """Time a training step over each size, and draw it."""
    base = Case("train", *settings.shapes[0])
    with open_processes([*OURS, *_without_keras(baselines), LIMIT]) as processes:
        cases = growth_cases(base, settings.factors)
        results = [_time_case(processes, case, settings) for case in cases]
    picture = size_picture(results, base, cpu_model())
    return Measurement(results, table(timing_rows(results)), {"bench.png": picture})


def growth_cases(base: Case, factors: Sequence[float]) -> list[Case]:
    """Return `base` and the cases that differ from it in one size."""
    cases = [base, *(base._replace(num_layers=num_layers) for num_layers in LAYERS)]
    for size in ("batch_size", "seq_len", "hidden_size", "vocab_size"):
        for factor in factors:
            # Vocabularies range from dozens (English) to thousands (Chinese).
            factor = factor**2 if size == "vocab_size" and factor > 1 else factor
            cases.append(base._replace(**{size: max(2, round(getattr(base, size) * factor))}))
    return list(dict.fromkeys(cases))


def measure_loop(settings: Settings, baselines: Sequence[str]) -> Measurement:
    """Time launch/train.py against a run of one step and the other steps alone.

    In the first round the run of one step compiles; later ones load what it has compiled.
    """
    case, num_steps, rounds = Case("train", *settings.shapes[0]), settings.loop_steps, []
    with open_processes(["default"]) as processes, TemporaryDirectory() as folder:
        text = write_random_text(Path(folder, "text.txt"), case)
        for _ in range(settings.commands):
            before = _time_case(processes, case, settings)["results"]["default"]
            startup, _ = run_training(case, text, 1)
            seconds, peak_bytes = run_training(case, text, num_steps)
            after = _time_case(processes, case, settings)["results"]["default"]
            bare = (num_steps - 1) * statistics.median(before["seconds"] + after["seconds"])
            rounds.append(
                {
                    "steps": num_steps,
                    "command_seconds": seconds,
                    "startup_seconds": startup,
                    "bare_seconds": bare,
                    "command_over_startup_and_bare": seconds / (startup + bare),
                    "peak_bytes": peak_bytes,
                }
            )
    return Measurement(rounds, table(rounds))


def measure_entropy(settings: Settings, baselines: Sequence[str]) -> Measurement:
    """Train on texts of known entropy rate, and compare the held-out bits per character with it."""
    results = []
    for source, config in known_sources(settings.small_sources):
        logger.info("entropy: %s, %d steps", source.name, config.num_steps)
        with open_processes(["jax"]) as processes:
            task = "jax_backend.train", config.to_dict(), Checkpoints(time.time()), source
            last = processes["jax"].submit(call, *task).result()[-1]
        results.append(
            {
                "source": source.name,
                "vocab_size": source.vocab_size,
                "entropy_rate": source.entropy_rate,
                "excess": last["bits_per_char"] / source.entropy_rate - 1,
                **last,
            }
        )
    return Measurement(results, table(results))


def measure_quality(settings: Settings, baselines: Sequence[str]) -> Measurement:
    """Measure the time to quality of the recipes, and of the tutorial in Keras."""
    seconds, with_keras = 60 * settings.minutes, "keras" in baselines
    results = time_to_quality.measure_recipes(settings.text, seconds, with_keras)
    picture = time_to_quality.picture(results, cpu_model())
    return Measurement(results, table(time_to_quality.rows(results)), {"quality.png": picture})


SECTIONS: dict[str, Callable[[Settings, Sequence[str]], Measurement]] = {
    "step": measure_step,
    "growth": measure_growth,
    "generate": measure_generation,
    "evaluate": measure_evaluation,
    "loop": measure_loop,
    "entropy": measure_entropy,
    "quality": measure_quality,
}
