"""Estimate what a config costs, or propose settings for a time."""

import logging
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from charlstm.cli import signals
from charlstm.config_check import validate
from charlstm.errors import UserError
from charlstm.parallel import sharding
from charlstm.planning import cost, memory, report, rules, timing
from charlstm.planning.chips import Chip, check_rows, chip_bytes, step_time
from charlstm.planning.compile import compile_costs, compile_largest_batch, for_topology
from charlstm.planning.timing import StageTimes
from charlstm.planning.topology import topology_devices
from charlstm.training.setup import Setup, prepare, set_up

logger = logging.getLogger(__name__)

TIMING_SECONDS = 6.0
WIDTH_SECONDS = 1.5  # for which each candidate width is timed
MARGIN = 0.03  # of the given time, since no two runs take the same time

Chips = tuple[Chip, int]


@dataclass(frozen=True)
class Plan:
    """The settings of a run and its costs. `str` gives a table."""

    config: ConfigDict  # for charlstm.training.loop.train
    settings: dict[str, Any]  # those that were proposed, by key
    costs: dict[str, Any]  # as `launch/plan.py --json` prints them

    def __str__(self) -> str:
        return report.cost_table(self.costs)


@dataclass(frozen=True)
class Compiled:
    """The programs of a run as they are compiled for accelerators. `str` gives a table."""

    costs: dict[str, Any]  # as `launch/plan.py --compile=... --json` prints them

    def __str__(self) -> str:
        return report.compiled_table(self.costs)


def estimate(
    config: ConfigDict, *, timing_seconds: float = TIMING_SECONDS, chips: Chips | None = None
) -> Plan:
    """Estimate the size, memory and time of a run on this machine.

    Args:
      config: the settings of the run.
      timing_seconds: how long to time training steps; 0 leaves out all measurements.
      chips: an entry of CHIPS and how many share the batch; adds their time by formula.

    Raises:
      UserError: if the config is invalid, or cannot run on this machine where it is to be timed.
    """
    begin = time.perf_counter()
    if not timing_seconds:
        setup = _read_setup(config, prepare)
        costs = _counted(setup)
    else:
        setup = _read_setup(config, set_up)
        loading = time.perf_counter() - begin + timing.process_seconds()
        costs = _all_costs(setup, _measure_stages(setup, timing_seconds), loading)
    return Plan(config, {}, costs | _accelerator(setup, chips))


def compile_for(config: ConfigDict, topology: str, *, find_largest: bool = False) -> Compiled:
    """Compile the programs of a run for accelerators, without any; return what a compiler reports.

    The process needs the environment of charlstm.cli.runtime.prepare_compilers. The text only has
    to be long enough to evaluate.

    Args:
      config: the settings of the run.
      topology: the chips that share the batch, such as 'v5e:4x4' or 'h100:8'.
      find_largest: also find the largest batch that fits, by compiling about four more steps.

    Raises:
      UserError: if the config is invalid or cannot run on these chips, if the compiler is missing,
        or if it does not know the topology.
      RunError: if the compiler fails.
    """
    validate(config)
    config = config.copy_and_resolve_references()
    if config.model.recurrence == "cudnn":
        raise UserError("config.model.recurrence=cudnn: JAX compiles it on a GPU only; use fused")
    if config.model.recurrence in ("auto", "native"):
        config.model.recurrence = "fused"  # which they are on accelerators
    devices = topology_devices(topology)
    setup = for_topology(_read_setup(_smallest(config)), config, devices)
    costs = compile_costs(setup, topology)
    if find_largest:
        step = costs["programs"]["training step"]
        costs["largest_batch"] = compile_largest_batch(setup, topology, step)
    return Compiled(costs)


def plan(
    config: ConfigDict,
    minutes: float,
    *,
    timing_seconds: float = TIMING_SECONDS,
    chips: Chips | None = None,
) -> Plan:
    """Propose the settings that learn the text best in a time on this machine.

    Chosen are width, streams, window, steps, dropout and learning rate, by charlstm.planning.rules.

    Args:
      config: all other settings, and the text.
      minutes: duration of the whole command, with start-up and evaluations.
      timing_seconds: how long to time training steps, above 0.
      chips: as in estimate.

    Raises:
      UserError: if the time is too short, the config is invalid, or the batch has fewer rows than
        there are chips.
    """
    seconds, begin = 60 * minutes, time.perf_counter()
    setup = _choose_shape(config, seconds)
    if chips:
        check_rows(setup.run.config, *chips)
    loading = time.perf_counter() - begin + timing.process_seconds()
    setup = _choose_width(setup, _seconds_left(seconds, loading))
    stages = _measure_stages(setup, timing_seconds)
    evaluation = timing.evaluation_seconds(setup, stages) + stages.save
    num_evaluations = rules.choose_evaluations(seconds, evaluation)
    fixed = loading + stages.start + stages.first_evaluation + stages.restore
    left = _seconds_left(seconds, fixed + num_evaluations * evaluation)
    max_steps = rules.MAX_EPOCHS * setup.batches.steps_per_epoch
    num_steps = min(max(1, int(left / stages.step)), max_steps)
    if num_steps == max_steps:
        logger.info("the text is short: %d epochs take less than the time", rules.MAX_EPOCHS)
    setup = _with_config(setup, rules.with_length(setup.run.config, num_steps, num_evaluations))
    timing.start_training(setup)  # leaves the compiled program in the cache for train.py
    costs = _all_costs(setup, stages, loading) | _accelerator(setup, chips)
    proposed = setup.run.config.copy_and_resolve_references()
    proposed.model.recurrence = config.model.recurrence  # train.py chooses again
    return Plan(proposed, rules.proposed_settings(proposed, config), costs)


def _scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """Create a folder that is deleted when its block ends or a signal ends the process."""
    folder = tempfile.TemporaryDirectory(prefix="charlstm-plan-")
    signals.cleanups.append(folder.cleanup)
    return folder


def _read_setup(
    config: ConfigDict, read: Callable[[ConfigDict, epath.Path], Setup] = prepare
) -> Setup:
    """Return the setup of a new run; `read` is prepare or, to check this machine too, set_up."""
    validate(config)
    with _scratch_folder() as folder:
        return read(config, epath.Path(folder) / "run")


def _smallest(config: ConfigDict) -> ConfigDict:
    """Return a copy of `config` for which any text is long enough and any machine has devices."""
    smallest = config.copy_and_resolve_references()
    smallest.batch_size, smallest.seq_len, smallest.mesh.data = 1, 1, 1
    return smallest


def _seconds_left(seconds: float, fixed: float) -> float:
    """Return the seconds left for steps; raise UserError if there are none."""
    left = seconds * (1 - MARGIN) - fixed
    if left > 0:
        return left
    raise UserError(
        f"--minutes={seconds / 60:g}: start-up and evaluations take {fixed:.1f} s here and leave "
        f"no time to train; give at least {math.ceil(fixed / 3) / 10}"
    )


def _choose_shape(config: ConfigDict, seconds: float) -> Setup:
    """Return a setup with batch_size and seq_len for the text."""
    config = rules.with_streams(config)
    text = _read_setup(_smallest(config)).run.text
    is_cpu = jax.default_backend() == "cpu"
    shape = rules.choose_shape(seconds, text.training_characters, is_cpu)
    config.batch_size, config.seq_len = shape
    num_chars, vocab_size = text.validation_characters, text.vocabulary
    return _read_setup(rules.with_text_limits(config, seconds, num_chars, vocab_size), set_up)


def _choose_width(setup: Setup, seconds: float) -> Setup:
    """Return `setup` with width, dropout and learning rate for `seconds`; time a few widths."""
    vocab_size, num_chars = setup.model.vocab_size, setup.run.text.training_characters
    # The widest for this text, whatever the time.
    most = rules.widest(setup.run.config, vocab_size, num_chars, math.inf, 1.0)
    width, tried = min(rules.FIRST_WIDTH, most), set()
    while width not in tried:
        tried.add(width)
        config = rules.with_width(setup.run.config, width)
        setup = _with_config(setup, config)
        logger.info("timing %d x %d units", config.model.num_layers, config.model.hidden_size)
        _, step = timing.time_steps(setup, *timing.start_training(setup), WIDTH_SECONDS)
        chars_per_second = config.batch_size * config.seq_len / step
        flops = chars_per_second * cost.flops_per_char(config, vocab_size)
        width = rules.widest(config, vocab_size, num_chars, seconds, flops)
    # The last timing may be of a neighboring width, whose operations per second differ little.
    config = rules.with_width(setup.run.config, width)
    num_read = seconds * flops / cost.flops_per_char(config, vocab_size)
    return _with_config(
        setup, rules.with_rates(config, min(rules.MAX_EPOCHS, num_read / num_chars))
    )


def _with_config(setup: Setup, config: ConfigDict) -> Setup:
    """Return `setup` with another width, dropout or length, and the same text and batches."""
    names = ("hidden_size", "num_layers", "dropout_rate", "recurrent_dropout")
    model = setup.model.clone(**{name: config.model[name] for name in names})
    num_steps = config.num_steps or setup.num_steps
    return setup._replace(run=setup.run._replace(config=config), model=model, num_steps=num_steps)


def _measure_stages(setup: Setup, seconds: float) -> StageTimes:
    logger.info("timing the stages of a run")
    with _scratch_folder() as folder:
        return timing.measure_stages(setup, epath.Path(folder), seconds)


def _all_costs(setup: Setup, stages: StageTimes, loading: float) -> dict[str, Any]:
    return _counted(setup) | _measured(setup, stages, loading) | memory.memory_costs(setup)


def _counted(setup: Setup) -> dict[str, Any]:
    """Return the costs that need no measurement."""
    config, vocab_size, text = setup.run.config, setup.model.vocab_size, setup.run.text
    forward = cost.flops_per_char(config, vocab_size)
    return {
        "text": text.source,
        "training_characters": text.training_characters,
        "vocabulary": vocab_size,
        "layers": config.model.num_layers,
        "hidden_size": config.model.hidden_size,
        "recurrence": config.model.recurrence,
        "batch_size": config.batch_size,
        "seq_len": config.seq_len,
        "parameters": cost.count_params(config, vocab_size),
        "forward_flops_per_char": forward,
        "training_flops_per_char": 3 * forward,
        "activation_bytes": cost.activation_bytes(config, vocab_size),
        "gradient_bytes": cost.gradient_bytes(config, vocab_size),
        "optimizer_bytes": cost.optimizer_bytes(config, vocab_size),
        "checkpoint_bytes": cost.state_bytes(config, vocab_size),
        "steps": setup.num_steps,
        "steps_per_epoch": setup.batches.steps_per_epoch,
    }


def _measured(setup: Setup, stages: StageTimes, loading: float) -> dict[str, Any]:
    """Return the costs in seconds on this machine."""
    config = setup.run.config
    command = timing.command_times(setup, stages, loading)
    return {
        "devices": sharding.describe(setup.mesh),
        "step_seconds": stages.step,
        "chars_per_second": config.batch_size * config.seq_len / stages.step,
        "epoch_seconds": setup.batches.steps_per_epoch * stages.step,
        "command_seconds": command._asdict() | {"total": command.total},
    }


def _accelerator(setup: Setup, chips: Chips | None) -> dict[str, Any]:
    """Return the costs of a step on `chips` by formula, as 'accelerator'; nothing without them."""
    if chips is None:
        return {}
    (chip, number), config, vocab_size = chips, setup.run.config, setup.model.vocab_size
    step = step_time(config, vocab_size, chip, number)
    needed = chip_bytes(config, vocab_size, number)
    costs = {
        "chip": chip.name,
        "chips": number,
        "batch_size": config.batch_size,
        "step_seconds": step.total,
        "chars_per_second": config.batch_size * config.seq_len / step.total,
        "seconds": step._asdict(),
        "limit": step.limit,
        "bytes_per_chip": needed,
        "fits": needed < chip.memory,
        "source": chip.source,
    }
    return {"accelerator": costs}
