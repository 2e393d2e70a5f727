"""How soon after the command a recipe has how few bits per character on the end of a text.

A point is a checkpoint: the seconds from the command until it lay on the disk, and the bits that
its weights need for the held-out part. They are counted once the training is over, so that no
contender is kept waiting by it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from charlstm.bench.cases import SPACING, describe_sample, sampled_starts
from charlstm.bench.race import Worker, refuse_failure
from charlstm.cli import signals, streams
from charlstm.errors import UserError

# In steps. The default does not save so often by itself: a tenth of a second or two each time, of
# the two or three seconds that the steps take, stays on its clock.
SAVE_EVERY = 100
NEVER = 2**31 - 1  # the largest period that a config can have
FOLDER_FILES = ("config.json", "vocab.json", "prompts.json")
DEFAULT = "default, lower-cased"
KERAS = "keras"
# The tutorial converts to lower case, so only the lower-cased default reads the same characters.
# The tutorial trains on all of its text and evaluates one window per character; here it leaves out
# what the others hold out, and does not evaluate.
OURS = {
    DEFAULT: ("--config=default", "--config.data.lowercase"),
    "default": ("--config=default",),
    "tutorial": (
        "--config=tutorial",
        "--config.data.val_fraction=0.1",
        f"--config.eval_every_steps={NEVER}",
    ),
}


class Kept(NamedTuple):
    """A checkpoint that was copied before the run deleted it."""

    step: int
    seconds: float  # from the command until it was on the disk
    folder: Path  # a run folder with this checkpoint alone


def measure_ours(name: str, flags: Sequence[str], folder: Path, seconds: float) -> dict[str, Any]:
    """Run launch/train.py for `seconds` at most, and return its config, text and points.

    Args:
      name: of the contender.
      flags: of launch/train.py, but for --workdir.
      folder: a new folder for all that it writes.
      seconds: from the command on; once they are over it is asked to save and end.
    """
    kept = train_and_keep(flags, folder, seconds)
    about = json.loads((kept[-1].folder / "config.json").read_text(encoding="utf-8"))
    worker = Worker("charlstm")
    try:
        scored = worker.ask("score", folders=[str(each.folder) for each in kept])
    finally:
        worker.close()
    columns = zip(kept, scored.pop("bits_per_char"), strict=True)
    points = [
        {"step": each.step, "seconds": each.seconds, "bits_per_char": bits}
        for each, bits in columns
    ]
    about = {key: about[key] for key in ("config", "text")}
    return {"contender": name, "flags": list(flags)} | about | scored | {"points": points}


def measure_keras(ours: Mapping[str, Any], folder: Path, seconds: float) -> dict[str, Any]:
    """Let Keras learn by the recipe, and from the text, of `ours`; return as measure_ours does."""
    start = time.time()
    # As ours it finds nothing that was compiled before.
    worker = Worker(KERAS, JAX_COMPILATION_CACHE_DIR=str(folder / "compiled"))
    try:
        worker.ask("ready")
        about = {"config": ours["config"], "source": ours["text"]["source"]}
        learnt = worker.ask("learn", start=start, seconds=seconds, **about)
    finally:
        worker.close()
    return {"contender": KERAS, "config": ours["config"], "text": ours["text"]} | learnt


def train_and_keep(flags: Sequence[str], folder: Path, seconds: float) -> list[Kept]:
    """Run launch/train.py and return copies of its checkpoints, a growing time apart, and the last.

    Raises:
      RunError: if it fails.
      UserError: if it has no checkpoint after `seconds`.
    """
    workdir = folder / "run"
    command = [sys.executable, f"{streams.LAUNCH}/train.py", f"--workdir={workdir}"]
    command += [f"--config.checkpoint_every_steps={SAVE_EVERY}", *flags]
    # Without a compilation cache, as at a first start.
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    with open(folder / "train.log", "w+") as log:
        start = time.time()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        signals.cleanups.append(process.kill)
        try:
            kept = list(watch(process, workdir, start, seconds))
        finally:
            process.kill()
            process.wait()
        # The second while Python was still starting.
        ends = (128 + signal.SIGTERM, -signal.SIGTERM) if time.time() - start > seconds else ()
        refuse_failure(process.returncode, log, ends)
    if not kept:
        raise UserError(
            f"--minutes={seconds / 60:g}: launch/train.py had not taken a step by then; give more"
        )
    return kept


def watch(process: subprocess.Popen, workdir: Path, start: float, seconds: float) -> Iterator[Kept]:
    """Yield copies of the checkpoints that appear in `workdir` until `process` has ended.

    It gets SIGTERM once `seconds` have passed since `start`, by time.time().
    """
    newest, due, is_logged, is_running = None, 0.0, False, True
    while is_running:
        # Asked before the folder is looked at, so that the last checkpoint is not missed.
        is_running = process.poll() is None
        step, now = newest_step(workdir / "checkpoints"), time.time() - start
        if step > (newest.step if newest else 0):
            newest = Kept(step, now, workdir.parent / str(step))
            if now >= due:
                due = SPACING * now
                yield keep(newest, workdir)
        if now > seconds and not is_logged:
            process.terminate()
            is_logged = True
        time.sleep(0.02)
    if newest and not newest.folder.exists():
        yield keep(newest, workdir)


def newest_step(folder: Path) -> int:
    """Return the newest step of which `folder` has a whole checkpoint, 0 if there is none."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    # What is not yet whole, or no longer, has another name.
    return max((int(name) for name in names if name.isdecimal()), default=0)


def keep(checkpoint: Kept, workdir: Path) -> Kept:
    """Copy a checkpoint, and what makes a run folder of it."""
    place = Path("checkpoints", str(checkpoint.step))
    shutil.copytree(workdir / place, checkpoint.folder / place)
    for name in FOLDER_FILES:
        shutil.copy(workdir / name, checkpoint.folder)
    return checkpoint


def score(folders: Sequence[str]) -> dict[str, Any]:
    """Return the held-out bits per character of each run folder; they differ in weights only.

    `scored` tells which characters count. Of a run on windows it is a sample: each needs a window
    of its own.
    """
    import math

    import jax

    from charlstm.data.batches import Windows, evaluation_batches, split
    from charlstm.data.corpus import open_corpus
    from charlstm.model import zero_carry
    from charlstm.runs.checkpoints import load_model
    from charlstm.steps import evaluate, make_eval_step

    run, model, _ = load_model(folders[0], "latest")
    data = run.config.data
    text = open_corpus(data, data.path, source=run.text.source)
    _, ids_M = split(text.ids_M, data)
    batches = evaluation_batches(ids_M, run.config)
    if isinstance(batches, Windows):
        steps = list(chosen_windows(batches, sampled_starts(batches.num_windows)))
        scored = describe_sample(batches.num_windows)
    else:
        steps = list(batches.epoch())
        scored = f"each of {len(ids_M) - 1:,} characters, the carry handed on"
    eval_step, empty = jax.jit(make_eval_step(model)), zero_carry(model, batches.batch_size)
    losses = [
        evaluate(eval_step, load_model(folder, "latest")[2], empty, steps)["loss"]
        for folder in folders
    ]
    return {"scored": scored, "bits_per_char": [loss / math.log(2) for loss in losses]}


def chosen_windows(batches: Any, starts_N: Any) -> Iterator[Any]:
    """Yield batches of the windows of `batches` (Windows) that begin at `starts_N`.

    The last batch is filled up with windows of weight 0, so that all have one shape.
    """
    import numpy as np

    from charlstm.data.batches import Batch

    batch_size, seq_len = batches.batch_size, batches.seq_len
    for begin in range(0, len(starts_N), batch_size):
        some_K = starts_N[begin : begin + batch_size]
        start_B = np.pad(some_K, (0, batch_size - len(some_K)))
        position_BT = start_B[:, None] + np.arange(seq_len)
        weights_BT = np.zeros(position_BT.shape, np.float32)
        weights_BT[: len(some_K), -1] = 1
        yield Batch(
            inputs_BT=batches.ids_M[position_BT].astype(np.int32),
            targets_BT=batches.ids_M[position_BT + 1].astype(np.int32),
            weights_BT=weights_BT,
            reset_B=np.ones(batch_size, dtype=bool),
        )
