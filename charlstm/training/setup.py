"""The setup of a run: its text, batches, devices and model."""

import logging
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from charlstm.config_check import validate
from charlstm.data.batches import Streams, Windows, evaluation_batches, split, training_batches
from charlstm.data.corpus import Corpus, open_corpus
from charlstm.data.sources import PYTHON_MANUAL
from charlstm.errors import OccupiedError, UserError
from charlstm.lstm.native_library import runs_on
from charlstm.model import CharLSTM, model_from_config, with_recurrence
from charlstm.parallel.sharding import describe, make_mesh
from charlstm.runs.folder import (
    Run,
    TextInfo,
    adapt_run,
    check_free,
    has_run,
    load_run,
    random_prompts,
)
from charlstm.runs.machine import check_backend, check_memory, default_prng_impl, this_machine
from charlstm.system.console import status
from charlstm.training.transfer import (
    Source,
    check_other,
    check_source,
    inherit_settings,
    load_source,
)

logger = logging.getLogger(__name__)

FEW_CHARS = 1000  # less than a page


class Setup(NamedTuple):
    """A run with its text, batches, devices, model and length."""

    run: Run
    mesh: Mesh
    model: CharLSTM
    batches: Streams | Windows
    val_batches: Streams | Windows | None
    num_steps: int
    initial: Source | None  # of the initial weights of a new run with config.init_from

    @property
    def log_every(self) -> int:
        """The number of steps between two training records in metrics.jsonl."""
        return self.run.config.log_every_steps

    @property
    def eval_every(self) -> int:
        """The number of steps between two evaluations."""
        return self.run.config.eval_every_steps or self.batches.steps_per_epoch

    @property
    def save_every(self) -> int:
        """The number of steps between two checkpoints, apart from those of evaluations."""
        return self.run.config.checkpoint_every_steps or self.num_steps

    def is_evaluated(self, step: int) -> bool:
        """Return whether an evaluation is due after `step` steps."""
        return step > 0 and (step >= self.num_steps or step % self.eval_every == 0)


def set_up(config: ConfigDict, workdir: epath.Path, unset: Collection[str] = ()) -> Setup:
    """Check `config` and this machine, then prepare the run; write nothing.

    Raises:
      UserError: as prepare, and for an invalid setting, a missing GPU or too little memory.
    """
    validate(config)
    check_backend(config)
    setup = prepare(config, workdir, unset)
    check_memory(setup.run.config, setup.model.vocab_size, setup.mesh)
    return setup


def prepare(config: ConfigDict, workdir: epath.Path, unset: Collection[str] = ()) -> Setup:
    """Read the text of `config`, and the run in `workdir` if there is one; write nothing.

    With config.init_from, the settings of the model in `unset` become those of the run there.

    Raises:
      UserError: if the text cannot be used, if the devices cannot share a batch, or if the run
        cannot start from config.init_from.
      OccupiedError: if the folder belongs to another run or holds other files.
    """
    mesh = make_mesh(config)
    run: Run | None = None
    initial: Source | None = None
    changes: list[str] = []
    if config.init_from:
        check_other(config.init_from, workdir)
    if has_run(workdir):
        run = load_run(workdir)
        if config.init_from:
            config = inherit_settings(config, run.config, unset)
        config = keep_recurrence(config, run, mesh)
        run, changes = adapt_run(run, config)
    else:
        check_free(workdir)
        if config.init_from:
            initial = load_source(config.init_from)
            config = inherit_settings(config, initial.config, unset)
    # A run that fell back to Python's manual keeps it, even if the default book is now available.
    is_manual = run and not config.data.path and run.text.source == PYTHON_MANUAL
    with status("reading the text"):
        source = PYTHON_MANUAL if is_manual else ""
        corpus = open_corpus(config.data, config.data.path, source=source)
    if run and (run.text.sha256, run.vocab.characters) != (corpus.sha256, corpus.vocab.characters):
        raise OccupiedError(
            f"{corpus.source}: is not the text of the run in {workdir}, or has changed since; "
            f"restore the text with SHA-256 {run.text.sha256[:64]}, or choose another --workdir"
        )
    if initial:
        check_source(initial, config, corpus.vocab)
    train_ids, val_ids = split(corpus.ids_M, config.data)
    batches = training_batches(train_ids, config)
    val_batches = evaluation_batches(val_ids, config) if config.data.val_fraction else None
    num_steps = config.num_steps or config.num_epochs * batches.steps_per_epoch
    text = text_info(corpus, train_ids, val_ids)
    machine = this_machine()
    if run:
        run = run._replace(text=text)
        log_changes(run, changes, machine["versions"])
    else:
        # After the errors of a user, since it may compile native.cc.
        config = with_recurrence(config, mesh.size)
        prompts = random_prompts(train_ids, corpus.vocab, config.seq_len, config.seed)
        weights = initial.weights if initial else None
        about = text, prompts, machine, default_prng_impl(), weights
        run = Run(workdir, config, corpus.vocab, *about)
    model = model_from_config(config, corpus.vocab).clone(num_shards=mesh.size)
    return Setup(run, mesh, model, batches, val_batches, num_steps, initial)


def keep_recurrence(config: ConfigDict, run: Run, mesh: Mesh) -> ConfigDict:
    """Return a copy of `config` with the recurrence of `run` in place of 'auto'.

    Another one would give the same up to rounding, but not the same bits.

    Raises:
      UserError: if it needs a compiler or a GPU that is missing.
    """
    config = ConfigDict(config.to_dict())  # mutable, unlike a FrozenConfigDict
    if config.model.recurrence != "auto":
        return config
    config.model.recurrence = run.config.model.recurrence
    if config.model.recurrence == "native" and not runs_on(mesh.size):
        logger.warning(
            "the run began with config.model.recurrence=native, which runs as fused on %s: it "
            "continues, but not with the same bits",
            describe(mesh),
        )
    else:
        try:
            check_backend(config)
        except UserError as error:
            raise UserError(
                f"{run.workdir}: began with {error}: --config.model.recurrence=fused continues the "
                "run, the same up to rounding"
            ) from error
    return config


def open_run_text(run: Run, remedy: str, may_fetch: bool = True) -> Corpus:
    """Return the text that `run` was trained on.

    Args:
      run: a run, which may have been started in another folder.
      remedy: what to do, for the error message.
      may_fetch: whether the default book may be downloaded again.

    Raises:
      UserError: if the text cannot be read or has changed.
    """
    if not run.text.source:
        raise UserError(f"{run.workdir}: the text of this model is unknown; {remedy}")
    # An absolute path, or the name of Python's manual.
    source, data = run.text.source, run.config.data
    is_fetched = source == PYTHON_MANUAL or (may_fetch and not data.path)
    corpus = open_corpus(data, "" if is_fetched else source, source=source, remedy=remedy)
    if corpus.sha256 != run.text.sha256:
        raise UserError(f"{corpus.source}: has changed since the run was trained; {remedy}")
    return corpus


def text_info(corpus: Corpus, train_ids: np.ndarray, val_ids: np.ndarray) -> TextInfo:
    """Return the description of a text for config.json."""
    return TextInfo(
        source=corpus.source,
        sha256=corpus.sha256,
        bytes=corpus.num_bytes,
        characters_cut=corpus.num_cut,
        characters=len(train_ids) + len(val_ids),
        training_characters=len(train_ids),
        validation_characters=len(val_ids),
        vocabulary=len(corpus.vocab),
    )


def log_changes(run: Run, changes: list[str], versions: dict[str, str]) -> None:
    """Log the settings and versions that differ from those at the start of the run."""
    for change in changes:
        logger.info("the run continues with a changed setting: %s", change)
    before = run.machine["versions"]
    differing = [
        f"{name} {before.get(name)} there and {version} here"
        for name, version in versions.items()
        if before.get(name) != version
    ]
    if differing:
        logger.warning(
            "the run began with other versions (%s): it continues, but not with the same bits",
            "; ".join(differing),
        )


def log_setup(setup: Setup, step: int, num_params: int) -> None:
    """Log the text, the model and the devices; `step` steps are done."""
    run, text = setup.run, setup.run.text
    lines = {
        "run folder": run.workdir,
        "text": text.source,
        "total characters": f"{text.characters:,}",
        "total vocabulary": text.vocabulary,
        "training on": f"{text.training_characters:,} characters",
        "validating on": f"{text.validation_characters:,} characters",
        "model": f"{run.config.model.num_layers} x {run.config.model.hidden_size} LSTM "
        f"({run.config.model.recurrence}), {num_params:,} parameters",
        "devices": describe(setup.mesh),
        "steps": f"{step:,} of {setup.num_steps:,} done, "
        f"{setup.batches.steps_per_epoch:,} per epoch",
    }
    if run.initial_weights:
        lines["initial weights"] = run.initial_weights.path
    if text.characters_cut:
        lines["total characters"] += (
            f" ({text.characters_cut:,} of Project Gutenberg's headers and licences left out)"
        )
    if isinstance(setup.batches, Windows):
        lines["total patterns"] = f"{setup.batches.num_windows:,}"
    for name, value in lines.items():
        logger.info("%s: %s", name, value)
    if 0 < text.validation_characters < FEW_CHARS:
        logger.warning(
            "the validation text has only %d characters, so its metrics are noisy; use a longer "
            "text or a higher config.data.val_fraction",
            text.validation_characters,
        )
