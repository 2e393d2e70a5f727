"""Set up a run from a config and a folder: read the text, open the run, choose the devices."""

import logging
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from charlstm.data.batches import Streams, Windows, evaluation_batches, split, training_batches
from charlstm.data.corpus import Corpus, open_corpus
from charlstm.data.sources import PYTHON_MANUAL
from charlstm.errors import OccupiedError, UserError
from charlstm.model import CharLSTM, model_from_config
from charlstm.parallel.sharding import describe, make_mesh
from charlstm.runs.folder import Run, adapt_run, check_free, has_run, load_run, random_prompts
from charlstm.runs.machine import default_prng_impl, this_machine
from charlstm.system.console import status

logger = logging.getLogger(__name__)


MAX_CALL_STEPS = 32
MAX_CALL_CHARS = 2**22
FEW_CHARS = 1000  # less than a page


class Setup(NamedTuple):
    """A run with its text read, its devices chosen and its length known."""

    run: Run
    mesh: Mesh
    model: CharLSTM
    batches: Streams | Windows
    val_batches: Streams | Windows | None
    num_steps: int

    @property
    def log_every(self) -> int:
        """After how many steps the next line goes to metrics.jsonl."""
        return self.run.config.log_every_steps

    @property
    def eval_every(self) -> int:
        """After how many steps the next evaluation comes."""
        return self.run.config.eval_every_steps or self.batches.steps_per_epoch

    @property
    def save_every(self) -> int:
        """After how many steps the next checkpoint between evaluations comes."""
        return self.run.config.checkpoint_every_steps or self.num_steps

    def is_evaluated(self, step: int) -> bool:
        """Return whether an evaluation is due after `step` steps."""
        return step > 0 and (step >= self.num_steps or step % self.eval_every == 0)

    @property
    def max_steps_per_call(self) -> int:
        """How many steps one compiled call may take, whose batches wait in memory together."""
        config = self.run.config
        in_memory = MAX_CALL_CHARS // (config.batch_size * config.seq_len)
        return max(1, min(MAX_CALL_STEPS, in_memory, config.log_every_steps, self.num_steps))


def steps_ahead(setup: Setup, step: int) -> int:
    """Return how many steps after `step` something else is due: a line, an evaluation, the end."""
    periods = (setup.log_every, setup.eval_every, setup.save_every, setup.num_steps)
    return min(period - step % period for period in periods)


def prepare(config: ConfigDict, workdir: epath.Path) -> Setup:
    """Read the text of `config`, and the run in `workdir` if there is one; write nothing.

    Raises:
      UserError: for a text that can't be used or devices that can't share a batch.
      OccupiedError: for a folder of another run or with foreign files.
    """
    mesh = make_mesh(config)
    run = load_run(workdir) if has_run(workdir) else None
    if not run:
        check_free(workdir)
    is_manual = run and not config.data.path and run.text["source"] == PYTHON_MANUAL
    changes: list[str] = []
    if run:
        run, changes = adapt_run(run, config)
    source = PYTHON_MANUAL if is_manual else ""
    with status("reading the text"):
        text = open_corpus(config.data, config.data.path, source=source)
    if run and (run.text["sha256"] != text.sha256 or run.vocab.characters != text.vocab.characters):
        raise OccupiedError(
            f"{text.source}: has changed since the run in {workdir} began, or is not its text; "
            f"bring back the text with SHA-256 {run.text['sha256'][:64]}, "
            "or choose another --workdir"
        )
    train_ids, val_ids = split(text.ids_M, config.data)
    batches = training_batches(train_ids, config)
    val_batches = evaluation_batches(val_ids, config) if config.data.val_fraction else None
    num_steps = config.num_steps or config.num_epochs * batches.steps_per_epoch
    about = describe_text(text, train_ids, val_ids)
    here = this_machine()
    if run:
        run = run._replace(text=about)
        log_changes(run, changes, here)
    else:
        prompts = random_prompts(train_ids, text.vocab, config.seq_len, config.seed)
        run = Run(workdir, config, text.vocab, about, prompts, here, default_prng_impl())
    model = model_from_config(config, text.vocab).clone(num_shards=mesh.size)
    return Setup(run, mesh, model, batches, val_batches, num_steps)


def open_run_text(run: Run, remedy: str, may_fetch: bool = True) -> Corpus:
    """Return the text that `run` was trained on.

    Args:
      run: perhaps started in another folder.
      remedy: what to do, for the error.
      may_fetch: whether Dracula, if that is the text, may be downloaded again.

    Raises:
      UserError: if it cannot be read or has changed.
    """
    # An absolute path, but for Python's manual.
    source, data = run.text["source"], run.config.data
    is_fetched = source == PYTHON_MANUAL or (may_fetch and not data.path)
    text = open_corpus(data, "" if is_fetched else source, source=source, remedy=remedy)
    if text.sha256 != run.text["sha256"]:
        raise UserError(f"{text.source}: has changed since the run was trained; {remedy}")
    return text


def log_changes(run: Run, changes: list[str], here: dict[str, Any]) -> None:
    """Log what differs from the start of the run but does not prevent a resume."""
    for change in changes:
        logger.info("the run goes on with a setting changed: %s", change)
    began = run.machine["versions"]
    others = [
        f"{name} {began.get(name)} there and {version} here"
        for name, version in here["versions"].items()
        if began.get(name) != version
    ]
    if others:
        logger.warning(
            "the run began with other versions (%s): it goes on, but not bit for bit as it would "
            "have there",
            "; ".join(others),
        )


def describe_text(text: Corpus, train_ids: np.ndarray, val_ids: np.ndarray) -> dict[str, Any]:
    """Return what config.json says of the text."""
    return {
        "source": text.source,
        "sha256": text.sha256,
        "bytes": text.num_bytes,
        "characters_cut": text.num_cut,
        "characters": len(train_ids) + len(val_ids),
        "training_characters": len(train_ids),
        "validation_characters": len(val_ids),
        "vocabulary": len(text.vocab),
    }


def report(setup: Setup, step: int, num_params: int) -> None:
    """Log the text, the model and the devices."""
    run, text = setup.run, setup.run.text
    lines = {
        "run folder": run.workdir,
        "text": text["source"],
        "total characters": f"{text['characters']:,}",
        "total vocabulary": text["vocabulary"],
        "training on": f"{text['training_characters']:,} characters",
        "validating on": f"{text['validation_characters']:,} characters",
        "model": f"{run.config.model.num_layers} x {run.config.model.hidden_size} LSTM, "
        f"{num_params:,} parameters",
        "devices": describe(setup.mesh),
        "steps": f"{step:,} of {setup.num_steps:,} done, "
        f"{setup.batches.steps_per_epoch:,} per epoch",
    }
    if text["characters_cut"]:
        lines["total characters"] += (
            f" ({text['characters_cut']:,} of Project Gutenberg's headers and licences left out)"
        )
    if isinstance(setup.batches, Windows):
        lines["total patterns"] = f"{setup.batches.num_windows:,}"
    for name, value in lines.items():
        logger.info("%s: %s", name, value)
    if 0 < text["validation_characters"] < FEW_CHARS:
        logger.warning(
            "validation figures mean little: they rest on %d characters; "
            "a longer text, or a higher config.data.val_fraction, helps",
            text["validation_characters"],
        )
