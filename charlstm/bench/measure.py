"""Measure the sections of the benchmark."""

import logging
import os
import platform
import random
import re
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from charlstm.bench import timing
from charlstm.bench.cases import Case, Checkpoints
from charlstm.bench.entropy import known_sources
from charlstm.bench.report import quality_picture, size_picture, table
from charlstm.bench.serving import measure_serving
from charlstm.cli import signals, streams
from charlstm.config import base_config
from charlstm.errors import RunError

logger = logging.getLogger("charlstm.bench")

SECTIONS = ("step", "growth", "generate", "evaluate", "loop", "serve", "entropy", "quality")
TARGETS = (2.5, 2.3, 2.2, 2.1, 2.0)  # bits per character
SPACING = 1.1  # least ratio of the elapsed seconds of two checkpoints
OURS = ("charlstm", "flax", "default")
ONLY_STEP = ("fused", "products")
HELD_OUT_CHARS = 85_000  # read by evaluate
GENERATED_CHARS = 200
LAYERS = (1, 2, 4)
# (B, T, H) of training steps; other sections use the first, that of the default recipe.
SHAPES = (
    (8, 100, 384),
    (16, 64, 640),
    (16, 100, 256),
    (32, 50, 256),
    (128, 100, 256),
    (32, 64, 512),
    (64, 64, 512),
    (16, 64, 1024),
)


@dataclass(frozen=True)
class Settings:
    """Sizes and durations of the measurements."""

    shapes: Sequence[tuple[int, int, int]] = SHAPES
    batch_sizes: Sequence[int] = (1, 8, 64, 256)  # for generate
    rounds: int = 9
    round_seconds: float = 0.25  # timers and waking threads take much less
    commands: int = 3  # rounds of loop
    loop_steps: int = 1000
    factors: Sequence[float] = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)  # of each size, for growth
    readers: tuple[int, ...] = (1, 8, 32)  # for serve
    serve_seconds: float = 20.0
    serve_requests: int = 1000
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
    readers=(1, 8),
    serve_seconds=1.0,
    serve_requests=16,
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
    what: str, settings: Settings = FULL, baselines: Sequence[str] = timing.BASELINES
) -> Measurement:
    """Measure one section of the benchmark.

    Every backend runs in a process of its own, which imports the main module again; a script that
    calls this function needs `if __name__ == "__main__":`.

    Args:
      what: one of SECTIONS.
      settings: sizes and durations.
      baselines: 'torch', 'keras' or both. If one is not installed or fails, its result is an error.

    Raises:
      RunError: if launch/train.py or launch/serve.py fails.
      UserError: if settings.text cannot be read.
    """
    if what == "loop":
        return measure_loop(settings)
    if what == "serve":
        return measure_serve(settings)
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
            Case("generate", rows, GENERATED_CHARS, base.hidden_size)
            for rows in settings.batch_sizes
        ],
        "evaluate": [base._replace(task="evaluate", num_windows=windows)],
    }[what]
    names = [*OURS, *(ONLY_STEP if what == "step" else ()), *baselines]
    if what in ("growth", "evaluate"):  # Keras compiles for long, and cannot evaluate streams
        names = [name for name in names if name != "keras"]
    pace = settings.rounds, settings.round_seconds
    # New processes for each case, because peak memory is per process; growth has too many cases.
    groups = [cases] if what == "growth" else [[case] for case in cases]
    results = []
    for group in groups:
        with timing.open_processes(names) as processes:
            for case in group:
                results += timing.time_interleaved(processes, case, *pace)
    pictures = {"bench.png": size_picture(results, base)} if what == "growth" else {}
    return Measurement(results, pictures)


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
    pace = settings.rounds, settings.round_seconds
    with timing.open_processes(["default"]) as processes, temporary_folder() as folder:
        text = write_random_text(folder / "text.txt", case)
        for index in range(settings.commands):
            timings = timing.time_interleaved(processes, case, *pace)
            with timing.open_processes(["command"]) as commands:
                submit = commands["command"].submit
                startup, _ = submit(run_training, case, text, 1).result()
                seconds, peak = submit(run_training, case, text, steps).result()
            timings += timing.time_interleaved(processes, case, *pace)
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
    medians = {key: statistics.median(each[key] for each in rounds) for key in [*rounds[0]][1:]}
    return Measurement([*rounds, {"round": "median"} | medians])


def measure_serve(settings: Settings) -> Measurement:
    """Measure launch/serve.py with a run of one step, of the default recipe's sizes."""
    case = Case("train", *settings.shapes[0])
    with temporary_folder() as folder, timing.open_processes(["command"]) as commands:
        text = write_random_text(folder / "text.txt", case)
        commands["command"].submit(run_training, case, text, 1).result()
        [config] = folder.glob("*/config.json")
        pace = settings.readers, settings.serve_seconds, settings.serve_requests
        return Measurement(measure_serving(config.parent, *pace))


def run_training(case: Case, text: Path, num_steps: int) -> tuple[float, float]:
    """Run launch/train.py with the sizes of `case`; return its seconds and its peak MiB.

    Called in a new process, whose only child is the command. The run folder and the cache of
    compiled programs lie beside `text`.
    """
    flags = [
        f"--workdir={tempfile.mkdtemp(dir=text.parent)}",
        f"--config.data.path={text}",
        f"--config.num_steps={num_steps}",
        f"--config.batch_size={case.batch_size}",
        f"--config.seq_len={case.seq_len}",
        f"--config.model.hidden_size={case.hidden_size}",
    ]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(text.with_name("compiled"))}
    command = [sys.executable, f"{streams.LAUNCH}/train.py", *flags]
    begin = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - begin
    if ended.returncode:
        last_line = (ended.stderr.strip().splitlines() or [""])[-1]
        raise RunError(f"launch/train.py ended with {ended.returncode}: {last_line}")
    return seconds, timing.peak_mib(resource.RUSAGE_CHILDREN)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a new folder that is also removed when a signal ends the process."""
    with tempfile.TemporaryDirectory() as folder:
        signals.cleanups.append(partial(shutil.rmtree, folder, ignore_errors=True))
        yield Path(folder)


def write_random_text(path: Path, case: Case, size: int = 850_000) -> Path:
    """Write a text with all V characters of `case`, and return `path`."""
    # CJK characters, which cleaning does not change.
    alphabet = [chr(0x4E00 + index) for index in range(case.vocab_size)]
    chosen = random.Random(0).choices(alphabet, k=size - case.vocab_size)
    path.write_text("".join(alphabet + chosen), encoding="utf-8")
    return path


def measure_entropy(settings: Settings) -> Measurement:
    """Train on texts of known entropy rate, and compare the held-out bits per character with it."""
    results = []
    for source, config in known_sources(settings.small_sources):
        logger.info("entropy: %s, %d steps", source.name, config.num_steps)
        with timing.open_processes(["jax"]) as processes:
            task = "jax_backend.train", config.to_dict(), Checkpoints(time.time()), source
            last = processes["jax"].submit(timing.call, *task).result()[-1]
            recurrence = processes["jax"].submit(timing.call, timing.DEFAULT_RECURRENCE).result()
        excess = last["bits_per_char"] / source.entropy_rate - 1
        about = {"source": source.name, "entropy_rate": source.entropy_rate, "excess": excess}
        results.append(about | last | {"recurrence": recurrence})
    return Measurement(results)


def recipes(text: str, with_keras: bool) -> dict[str, ConfigDict]:
    """Return the recipes to compare, on the text at a path; '' is Dracula."""
    path = os.path.join(streams.REPOSITORY, "configs", "tutorial.py")
    configs = {"default, lower-cased": base_config(), "default": base_config()}
    for name in ("tutorial", "keras") if with_keras else ("tutorial",):
        configs[name] = runpy.run_path(path)["get_config"]()
        configs[name].data.val_fraction = base_config().data.val_fraction
    # The tutorial reads lower case, and only the first recipe predicts the same characters.
    configs["default, lower-cased"].data.lowercase = True
    for config in configs.values():
        config.data.path = text
    return configs


def measure_recipes(text: str, seconds: float, with_keras: bool) -> list[dict[str, Any]]:
    """Train the recipes for at most `seconds` each, one after another, and return the results.

    The seconds count from the start of a new process without compiled programs (a machine compiles
    native.cc only once) to a checkpoint, and exclude its scoring. `default_seconds` are those at
    which the default recipe reached the final bits per character of this one, if they predict the
    same characters.
    """
    results: list[dict[str, Any]] = []
    for name, config in recipes(text, with_keras).items():
        logger.info("quality: %s", name)
        backend = "keras" if name == "keras" else "jax"
        checkpoints = Checkpoints(time.time(), seconds, SPACING)
        with (
            temporary_folder() as cache,
            timing.open_processes([backend], JAX_COMPILATION_CACHE_DIR=str(cache)) as processes,
        ):
            task = f"{backend}_backend.train", config.to_dict(), checkpoints
            points, error = timing.try_run(name, processes[backend], timing.call, *task)
            if backend == "jax":
                ask = timing.call, timing.DEFAULT_RECURRENCE
                recurrence, _ = timing.try_run(name, processes[backend], *ask)
                config.model.recurrence = recurrence or "auto"
        result = {"recipe": name, "config": config.to_dict(), "points": points or []}
        results.append(result)
        if error:
            result |= {"error": error}
            continue
        result |= {f"seconds_to_{bits}": seconds_to(points, bits) for bits in TARGETS}
        result |= {key: points[-1][key] for key in ("bits_per_char", "seconds")}
        if config.data.lowercase:
            result["default_seconds"] = seconds_to(
                results[0]["points"], points[-1]["bits_per_char"]
            )
    return results


def seconds_to(points: Sequence[Mapping[str, float]], bits: float) -> float | None:
    """Return the seconds of the first point with at most `bits`, None if there is none."""
    return next((each["seconds"] for each in points if each["bits_per_char"] <= bits), None)


def describe_machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return the processor, the system, and the versions of our packages and of `packages`."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall("model name.*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    ours = "charlstm", "jax", "jaxlib", "flax", "optax", "numpy"
    return {
        "cpu": models[0] if models else platform.processor(),
        "cpus": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "platform": f"{platform.platform()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in (*ours, *packages)},
    }
