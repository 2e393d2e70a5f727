"""The sections of bench.py: each measures, prints its table and returns its part of bench.json."""

import logging
import random
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from charlstm.bench import quality_report, report
from charlstm.bench.cases import Case
from charlstm.bench.entropy import known_sources, learn
from charlstm.bench.quality import KERAS, OURS, measure_keras, measure_ours
from charlstm.bench.race import Command, Timing, Worker, race, run_training, start_workers
from charlstm.cli import signals
from charlstm.config import base_config

logger = logging.getLogger("charlstm.bench")

Shape = tuple[int, int, int]  # B, T, H


class Settings(NamedTuple):
    """How much to measure."""

    shapes: tuple[Shape, ...]  # of 'step'
    base: Shape  # of all other sections
    texts: tuple[int, ...]
    vocab_size: int
    num_layers: int
    new_processes: bool  # for each case, so that its peak memory is its own
    repeats: int
    repeat_seconds: float  # more than what timers and waking threads cost
    command_runs: int  # how often 'loop' and 'startup' run launch/train.py
    loop_steps: int
    written: int  # characters that each text is continued by
    text_size: int  # characters of the text of 'loop' and 'startup'; a tenth of it is evaluated
    factors: tuple[float, ...]  # by which 'growth' multiplies B, T, H and V
    max_layers: int
    growth_peers: tuple[str, ...]
    small_sources: bool  # of 'entropy'
    minutes: float  # of 'quality': how long each contender trains at most
    text: str  # of 'quality', an absolute path; '' is Dracula


FULL = Settings(
    shapes=((32, 50, 256), (128, 100, 256), (64, 64, 512), (32, 64, 512), (16, 100, 256)),
    base=(16, 100, 256),
    texts=(1, 8, 64, 256),
    vocab_size=70,
    num_layers=1,
    new_processes=True,
    repeats=9,
    repeat_seconds=0.25,
    command_runs=3,
    loop_steps=1000,
    written=200,
    text_size=850_000,  # a novel
    factors=(1 / 8, 1 / 4, 1 / 2, 1, 2, 4),
    max_layers=4,
    growth_peers=("torch",),
    small_sources=False,
    minutes=30.0,
    text="",
)
QUICK = FULL._replace(
    shapes=((16, 50, 128),),
    base=(16, 50, 128),
    texts=(1,),
    new_processes=False,
    repeats=3,
    repeat_seconds=0.05,
    command_runs=1,
    loop_steps=100,
    written=100,
    text_size=100_000,
    factors=(1 / 4, 1),
    max_layers=2,
    growth_peers=(),
    small_sources=True,
    minutes=1.0,
)


class Bench:
    """What the sections share."""

    def __init__(self, settings: Settings, peers: tuple[str, ...], console: Console, about: str):
        """Measure as `settings` say, beside `peers`, on the machine that `about` names."""
        self._settings = settings
        self._peers = peers
        self._console = console
        self._about = about
        self._workers: dict[str, Worker] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="charlstm-bench-")
        signals.cleanups.append(self._folder.cleanup)
        self.pictures: dict[str, bytes] = {}  # PNGs by the names of their files

    def close(self) -> None:
        """End all processes and remove the run folders."""
        self._end_workers()
        self._folder.cleanup()

    def step(self) -> list[dict[str, Any]]:
        """Measure a training step."""
        names = ["charlstm", "flax", *self._peers, report.LIMIT]
        return self._races("step", names, [self._case(shape) for shape in self._settings.shapes])

    def generate(self) -> list[dict[str, Any]]:
        """Measure the writing of text."""
        case = self._case(self._settings.base)._replace(
            task="generate", seq_len=self._settings.written
        )
        cases = [case._replace(batch_size=texts) for texts in self._settings.texts]
        return self._races("generate", ["charlstm", "flax", *self._peers], cases)

    def evaluate(self) -> list[dict[str, Any]]:
        """Measure the reading of a held-out text."""
        case = self._case(self._settings.base)._replace(
            task="evaluate", num_characters=self._settings.text_size // 10
        )
        # Keras is left out: its evaluate is made for other data than one long text.
        peers = [name for name in self._peers if name != "keras"]
        return self._races("evaluate", ["charlstm", "flax", *peers], [case])

    def startup(self) -> dict[str, Any]:
        """Measure launch/train.py from the command to the first step in metrics.jsonl."""
        rounds = self._settings.command_runs
        seconds: dict[str, list[float]] = {"cold": [], "warm": []}
        for index in range(rounds):
            logger.info("startup: round %d of %d", index + 1, rounds)
            for state in seconds:
                command = self._run_training(f"compiled-{index}", to_the_end=False)
                seconds[state].append(command.first_line_seconds)
        medians = {state: statistics.median(values) for state, values in seconds.items()}
        figures = {
            "nothing compiled yet": f"{medians['cold']:.2f} s",
            "compiled by an earlier run": f"{medians['warm']:.2f} s",
        }
        title = f"Start-up: launch/train.py to its first step (medians of {rounds})"
        report.show_figures(self._console, title, figures)
        return {"median_seconds": medians, "seconds": seconds}

    def loop(self) -> dict[str, Any]:
        """Measure launch/train.py as a whole against its start-up and the bare steps."""
        steps, rounds = self._settings.loop_steps, self._settings.command_runs
        dropout_rate = base_config().model.dropout_rate
        case = self._case(self._settings.base)._replace(dropout_rate=dropout_rate)
        contenders = self._contenders(["charlstm"])
        measured = []
        for index in range(rounds):
            logger.info("loop: round %d of %d", index + 1, rounds)
            before = self._race(contenders, case)["charlstm"].seconds
            command = self._run_training("compiled-0", to_the_end=True)
            after = self._race(contenders, case)["charlstm"].seconds
            step_seconds = statistics.median(before + after)
            steps_before = command.first_line_step - 1
            measured.append(
                {
                    "command_seconds": command.seconds,
                    "startup_seconds": command.first_line_seconds - steps_before * step_seconds,
                    "bare_seconds": (steps - 1) * step_seconds,
                    "peak_bytes": command.peak_bytes,
                }
            )
        figures = report.summarise_loop(measured)
        report.show_loop(self._console, steps, figures)
        return {"steps": steps, "rounds": measured} | figures

    def growth(self) -> list[dict[str, Any]]:
        """Measure how the time of a training step grows with each size, and draw it."""
        base, races = self._case(self._settings.base), []
        peers = [name for name in self._peers if name in self._settings.growth_peers]
        names = ["charlstm", "flax", *peers, report.LIMIT]
        contenders = self._contenders(names)
        for case in growth_cases(base, self._settings.factors, self._settings.max_layers):
            logger.info("growth: %s", describe(case))
            races.append(report.summarise(self._race(contenders, case), case))
        about = f"around {describe(base)}, on {self._about}"
        self.pictures["bench.png"] = report.draw_growth(races, base, about)
        return races

    def entropy(self) -> list[dict[str, Any]]:
        """Measure how near a model comes to the entropy rate of texts of which it is known."""
        learnt = []
        for source, recipe in known_sources(self._settings.small_sources):
            logger.info("entropy: %s, %d steps", source.name, recipe.num_steps)
            learnt.append(learn(source, recipe))
        report.show_entropy(self._console, learnt)
        return learnt

    def quality(self) -> dict[str, Any]:
        """Measure how soon our recipes, and the tutorial in Keras, predict a text how well."""
        seconds, measured = 60 * self._settings.minutes, {}
        text = [f"--config.data.path={self._settings.text}"] if self._settings.text else []
        for name, flags in OURS.items():
            logger.info("quality: %s", name)
            measured[name] = measure_ours(name, [*flags, *text], self._new_folder(), seconds)
        if KERAS in self._peers:
            logger.info("quality: %s", KERAS)
            measured[KERAS] = measure_keras(measured["tutorial"], self._new_folder(), seconds)
        contenders = [quality_report.summarise(each) for each in measured.values()]
        quality_report.show_quality(self._console, contenders)
        picture = quality_report.draw_quality(contenders, f"on {self._about}")
        self.pictures["quality.png"] = picture
        compared = quality_report.compare(contenders)
        return {"contenders": contenders, "compared": compared}

    def _new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._folder.name))

    def _case(self, shape: Shape) -> Case:
        return Case("train", *shape, self._settings.vocab_size, self._settings.num_layers)

    def _race(self, contenders: Mapping[str, Worker], case: Case) -> dict[str, Timing]:
        return race(contenders, case, self._settings.repeats, self._settings.repeat_seconds)

    def _races(self, section: str, names: list[str], cases: list[Case]) -> list[dict[str, Any]]:
        races = []
        for case in cases:
            logger.info("%s: %s", section, describe(case))
            timings = self._race(self._contenders(names), case)
            races.append(report.summarise(timings, case))
        report.show_races(self._console, section, races)
        return races

    def _contenders(self, names: list[str]) -> dict[str, Worker]:
        if self._settings.new_processes:
            self._end_workers()
        self._workers |= start_workers(name for name in names if name not in self._workers)
        return {name: self._workers[name] for name in names}

    def _end_workers(self) -> None:
        while self._workers:
            self._workers.popitem()[1].close()

    def _run_training(self, cache: str, to_the_end: bool) -> Command:
        batch_size, seq_len, hidden_size = self._settings.base
        folder = Path(self._folder.name)
        text = folder / "text.txt"
        if not text.exists():
            # The config keeps a tenth for validation, and a stream has at least one window.
            size = max(self._settings.text_size, 2 * batch_size * (seq_len + 1))
            text.write_text(random_text(size, self._settings.vocab_size), encoding="utf-8")
        flags = [
            f"--config.data.path={text}",
            f"--config.num_steps={self._settings.loop_steps}",
            f"--config.batch_size={batch_size}",
            f"--config.seq_len={seq_len}",
            f"--config.model.hidden_size={hidden_size}",
            f"--config.model.num_layers={self._settings.num_layers}",
        ]
        return run_training(flags, folder, cache, to_the_end)


def describe(case: Case) -> str:
    """Return the sizes of `case` in words."""
    batch_size, seq_len, hidden_size, vocab_size, num_layers = case[1:6]
    return f"B={batch_size} T={seq_len} H={hidden_size} V={vocab_size} N={num_layers}"


def random_text(size: int, vocab_size: int) -> str:
    """Return a text of `size` characters, `vocab_size` of them distinct."""
    # Letters that no cleaning of a text touches, in Unicode's largest block of them.
    alphabet = [chr(0x4E00 + index) for index in range(vocab_size)]
    return "".join(alphabet + random.Random(0).choices(alphabet, k=size - vocab_size))


def growth_cases(base: Case, factors: tuple[float, ...], max_layers: int) -> list[Case]:
    """Return `base` and all cases that differ from it in one size."""
    cases = {base: None}  # a set that keeps its order
    for size in ("batch_size", "seq_len", "hidden_size", "vocab_size"):
        for factor in factors:
            # Vocabularies differ more than other sizes do: dozens in English, thousands in Chinese.
            factor = factor**2 if size == "vocab_size" and factor > 1 else factor
            value = max(2, round(getattr(base, size) * factor))
            cases[base._replace(**{size: value})] = None
    for num_layers in range(1, max_layers + 1):
        cases[base._replace(num_layers=num_layers)] = None
    return list(cases)
