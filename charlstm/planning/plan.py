"""Estimate what a config costs, or propose settings for a time."""

import logging
import math
import tempfile
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from charlstm.cli import signals
from charlstm.errors import UserError
from charlstm.parallel import sharding
from charlstm.planning import cost, rules, timing
from charlstm.planning.timing import Estimate, Parts
from charlstm.runs.machine import check_backend, check_memory, memory_bytes
from charlstm.training.setup import Setup, prepare

logger = logging.getLogger("charlstm.plan")

FACTOR = 4  # at least, between the two batches that are compiled to see how memory grows with rows
PROCESS_BYTES = 500 * 2**20  # of a process beside what XLA asks for: Python and its modules
# Runs planned for 4 GiB by XLA's figures alone took up to 4.25.
MEMORY_SHARE = 0.9
SHORT = 1.5  # seconds that a width is timed for; the one that is chosen, for longer
MARGIN = 0.03  # of the time that is asked for, since no two runs take the same


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """Make a folder that is removed at the end of its block, or when a signal ends the process."""
    folder = tempfile.TemporaryDirectory(prefix="charlstm-plan-")
    signals.cleanups.append(folder.cleanup)
    return folder


def read(config: ConfigDict) -> Setup:
    """Return the setup of `config` in a run folder that is not there."""
    with scratch_folder() as folder:
        return prepare(config, epath.Path(folder) / "run")


def check(setup: Setup) -> None:
    """Raise UserError if this machine cannot run `setup`, as train.py does."""
    config = setup.run.config
    check_backend(config)
    check_memory(config, setup.model.vocab_size, setup.mesh)


def describe(config: ConfigDict, seconds: float) -> dict[str, Any]:
    """Return what a run of `config` takes; steps are timed for `seconds`, nothing is if it is 0."""
    lap = timing.make_clock()
    setup = read(config)
    if not seconds:
        return _count(setup)
    check(setup)
    loading = lap() + timing.time_process()
    parts = _measure_parts(setup, seconds)
    return _count(setup) | _measured(setup, parts, loading) | _memory(setup)


def propose(
    config: ConfigDict, seconds: float, timing_seconds: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a run of the settings proposed for `seconds` takes, and these settings.

    Args:
      config: all other settings, and the text.
      seconds: what the whole command may take.
      timing_seconds: how many seconds to time steps.

    Raises:
      UserError: if the time is too short for a command that trains at all.
    """
    lap = timing.make_clock()
    setup = _shaped(config, seconds)
    check(setup)
    loading = lap() + timing.time_process()
    setup = _with_width(setup, _seconds_left(seconds, loading))
    parts = _measure_parts(setup, timing_seconds)
    evaluation = timing.evaluation_seconds(setup, parts) + parts.save
    num_evaluations = rules.choose_evaluations(seconds, evaluation)
    fixed = loading + parts.start + parts.once + parts.end + num_evaluations * evaluation
    num_steps = max(1, int(_seconds_left(seconds, fixed) / parts.step))
    most_steps = rules.MAX_EPOCHS * setup.batches.steps_per_epoch
    if num_steps > most_steps:
        logger.info(
            "the text is short for so much time: by its end it would be read more than %d times",
            rules.MAX_EPOCHS,
        )
    num_steps = min(num_steps, most_steps)
    setup = with_config(setup, rules.with_length(setup.run.config, num_steps, num_evaluations))
    timing.begin(setup)  # so that train.py finds it compiled
    about = _count(setup) | _measured(setup, parts, loading) | _memory(setup)
    return about, rules.settings_of(setup.run.config, config)


def _seconds_left(seconds: float, fixed: float) -> float:
    """Return the seconds that remain for steps.

    Raises:
      UserError: if it is nothing.
    """
    left = seconds * (1 - MARGIN) - fixed
    if left > 0:
        return left
    raise UserError(
        f"--minutes={seconds / 60:g}: all but the steps takes {fixed:.1f} s here; "
        f"give at least {math.ceil(fixed / 3) / 10}"
    )


def _shaped(config: ConfigDict, seconds: float) -> Setup:
    """Return a setup whose streams and window suit the text."""
    config = rules.with_streams(config)
    smallest = config.copy_and_resolve_references()
    smallest.batch_size, smallest.seq_len, smallest.mesh.data = 1, 1, 1
    text = read(smallest).run.text
    is_cpu = jax.default_backend() == "cpu"
    shape = rules.choose_shape(seconds, text.training_characters, is_cpu)
    config.batch_size, config.seq_len = shape
    return read(rules.with_text(config, seconds, text._asdict()))


def _with_width(setup: Setup, seconds: float) -> Setup:
    """Return `setup` with width, dropout and rate for `seconds`, timing a few widths."""
    vocab_size, num_chars = setup.model.vocab_size, setup.run.text.training_characters
    # No wider than the text is for.
    most = rules.widest(setup.run.config, vocab_size, num_chars, math.inf, 1.0)
    width, tried = min(rules.FIRST_WIDTH, most), set()
    while width not in tried:
        tried.add(width)
        config = rules.with_width(setup.run.config, width)
        setup = with_config(setup, config)
        logger.info("timing %d x %d units", config.model.num_layers, config.model.hidden_size)
        _, step = timing.time_steps(setup, *timing.begin(setup), SHORT)
        rate = config.batch_size * config.seq_len / step
        flops = rate * cost.flops_per_char(config, vocab_size)
        width = rules.widest(config, vocab_size, num_chars, seconds, flops)
    # The rate of a width that was not timed last differs little from that of its neighbour.
    config = rules.with_width(setup.run.config, width)
    chars_read = seconds * flops / cost.flops_per_char(config, vocab_size)
    num_epochs = min(rules.MAX_EPOCHS, chars_read / num_chars)
    return with_config(setup, rules.with_rates(config, num_epochs))


def with_config(setup: Setup, config: ConfigDict) -> Setup:
    """Return `setup` with another width, dropout or length, its text and batches as they are."""
    names = ("hidden_size", "num_layers", "dropout_rate", "recurrent_dropout")
    model = setup.model.clone(**{name: config.model[name] for name in names})
    num_steps = config.num_steps or setup.num_steps
    return setup._replace(run=setup.run._replace(config=config), model=model, num_steps=num_steps)


def _measure_parts(setup: Setup, seconds: float) -> Parts:
    logger.info("timing the parts of a run")
    with scratch_folder() as folder:
        return timing.measure_parts(setup, epath.Path(folder), seconds)


def _count(setup: Setup) -> dict[str, Any]:
    """Return what is computed without measuring."""
    config, vocab_size, text = setup.run.config, setup.model.vocab_size, setup.run.text
    forward = cost.flops_per_char(config, vocab_size)
    return {
        "text": text.source,
        "training_characters": text.training_characters,
        "vocabulary": vocab_size,
        "layers": config.model.num_layers,
        "hidden_size": config.model.hidden_size,
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


def _measured(setup: Setup, parts: Parts, loading: float) -> dict[str, Any]:
    """Return what was timed on this machine."""
    config = setup.run.config
    estimate: Estimate = timing.estimate(setup, parts, loading)
    return {
        "devices": sharding.describe(setup.mesh),
        "step_seconds": parts.step,
        "chars_per_second": config.batch_size * config.seq_len / parts.step,
        "epoch_seconds": setup.batches.steps_per_epoch * parts.step,
        "command_seconds": estimate._asdict() | {"total": estimate.total},
    }


def _memory(setup: Setup) -> dict[str, Any]:
    """Return what XLA says of memory, and the largest batch that fits."""
    rows = setup.run.config.batch_size
    there = memory_bytes()
    if jax.default_backend() == "cpu":
        there /= len(setup.mesh.local_devices)  # which share the machine's
    usable = MEMORY_SHARE * there - PROCESS_BYTES
    # Near the answer, since XLA compiles few rows to another program than many: from 1024 on, where
    # fused_lstm takes the gradient of one time step at a time, to one that copies more.
    many = max(FACTOR * rows, timing.rows_on_paper(setup, usable))
    small, large = ((n, timing.step_bytes(setup, n)) for n in (rows, many))
    return {
        "compiled_step_bytes": small[1],
        "memory_bytes": there,
        "largest_batch": timing.largest_batch(small, large, usable),
    }


def on_paper(
    config: ConfigDict, vocab_size: int, chip: cost.Chip, num_chips: int
) -> dict[str, Any]:
    """Return the time of a step on `num_chips` chips, by formula."""
    step = cost.step_time(config, vocab_size, chip, num_chips)
    needed = cost.device_bytes(config, vocab_size, num_chips)
    return {
        "chip": chip.name,
        "chips": num_chips,
        "batch_size": config.batch_size,
        "step_seconds": step.total,
        "chars_per_second": config.batch_size * config.seq_len / step.total,
        "seconds": step._asdict(),
        "limit": step.limit,
        "bytes_per_chip": needed,
        "fits": needed < chip.memory,
        "source": chip.source,
    }


def table(about: dict[str, Any]) -> str:
    """Return `about` in lines for people."""
    lines = {
        "text": f"{about['text']}, {about['training_characters']:,} characters to train on, "
        f"{about['vocabulary']:,} distinct",
        "model": f"{about['layers']} x {about['hidden_size']} LSTM, "
        f"{about['parameters']:,} parameters",
        "operations a character": f"{about['forward_flops_per_char']:,} to read, "
        f"{about['training_flops_per_char']:,} to train",
        "memory of a step": f"{_mib(about['activation_bytes'])} activations, "
        f"{_mib(about['gradient_bytes'])} gradient, {_mib(about['optimizer_bytes'])} optimizer",
        "a checkpoint": _mib(about["checkpoint_bytes"]),
        "steps": f"{about['steps']:,}, {about['steps_per_epoch']:,} an epoch",
    }
    if "command_seconds" in about:
        lines |= _lines_measured(about)
    if paper := about.get("on paper"):
        seconds = ", ".join(f"{k} {1000 * v:.2f}" for k, v in paper["seconds"].items())
        fits = "" if paper["fits"] else ", which is more than it has"
        lines[f"{paper['chips']} x {paper['chip']} on paper"] = (
            f"{1000 * paper['step_seconds']:.2f} ms a step of {paper['batch_size']:,} rows ("
            f"{seconds}), {paper['chars_per_second']:,.0f} characters/s, "
            f"{_mib(paper['bytes_per_chip'])} a chip{fits}; {paper['source']}"
        )
    if "command" in about:
        lines["try"] = about["command"]
    return "\n".join(f"{name}: {value}" for name, value in lines.items())


def _lines_measured(about: dict[str, Any]) -> dict[str, str]:
    spent = about["command_seconds"]
    gflops = about["training_flops_per_char"] * about["chars_per_second"] / 1e9
    return {
        "devices": about["devices"],
        "a step as compiled": _mib(about["compiled_step_bytes"]),
        "largest batch that fits": f"{about['largest_batch']:,} rows in "
        f"{_mib(about['memory_bytes'])}",
        "a step": f"{1000 * about['step_seconds']:.1f} ms, {about['chars_per_second']:,.0f} "
        f"characters/s, {gflops:,.0f} Gflop/s",
        "an epoch": _time(about["epoch_seconds"]),
        "the whole command": f"{_time(spent['total'])}: "
        + ", ".join(f"{name} {_time(spent[name])}" for name in Estimate._fields),
    }


def _mib(num_bytes: float) -> str:
    return (
        f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
    )


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
