"""The run folder: what makes a run readable and resumable, with nothing in it that executes.

config.json    all settings, the text and its sizes, versions and devices
vocab.json     the characters, id by id
prompts.json   windows of the training text, for samples without a prompt
metrics.jsonl, samples.txt, curves.png, TensorBoard events: see log.py
checkpoints/   Orbax: the two latest states and the best one
"""

import json
import math
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from charlstm.config import base_config, flatten, validate
from charlstm.errors import UserError
from charlstm.files import write_file
from charlstm.model import CharLSTM, model_from_config
from charlstm.optim import make_optimizer
from charlstm.steps import TrainState, init_state
from charlstm.text import Vocab

# Raised whenever an older reader could misunderstand a newer folder.
SCHEMA = 1
NUM_PROMPTS = 256


class Run(NamedTuple):
    """What a run folder says of its run, states apart."""

    workdir: epath.Path
    config: ConfigDict
    vocab: Vocab
    text: dict[str, Any]  # source, sha256, characters, training_characters, ...
    prompts: list[str]


def create_run(
    workdir: epath.Path, config: ConfigDict, vocab: Vocab, text: dict[str, Any], prompts: list[str]
) -> Run:
    """Make the run folder and write what identifies the run; config.json comes last."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_file(workdir / "vocab.json", vocab.to_json() + "\n")
        write_file(workdir / "prompts.json", json.dumps(prompts) + "\n")
        about = {
            "schema": SCHEMA,
            "config": config.to_dict(),
            "text": text,
            "versions": _versions(),
            "devices": [str(device) for device in jax.devices()],
        }
        write_file(workdir / "config.json", json.dumps(about, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"{workdir}: cannot write there ({error.strerror or error}); choose another --workdir"
        ) from None
    return Run(workdir, config, vocab, text, prompts)


def load_run(workdir: epath.Path) -> Run:
    """Read a run folder.

    Raises:
      UserError: if it is none, is damaged, or was written by a newer version.
    """
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir}: no run there (no config.json); train one with launch/train.py")
    about = _read_json(workdir / "config.json")
    if about.get("schema", 0) > SCHEMA:
        raise UserError(f"{workdir}: written by a newer version of charlstm; upgrade to read it")
    config = base_config().lock()
    try:
        config.update(ConfigDict(about["config"]))
        validate(config)
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{workdir}/config.json: not a config of this version ({error})") from None
    return Run(
        workdir=workdir,
        config=config,
        vocab=Vocab(_read_json(workdir / "vocab.json")),
        text=about["text"],
        prompts=_read_json(workdir / "prompts.json"),
    )


def check_same_config(run: Run, config: ConfigDict) -> None:
    """Raise UserError, naming the settings that differ, unless `run` was made with `config`."""
    theirs, ours = flatten(run.config), flatten(config)
    differing = [
        f"{key} is {theirs[key]!r} there and {ours[key]!r} here"
        for key in ours
        if ours[key] != theirs[key]
    ]
    if differing:
        raise UserError(
            f"{run.workdir}: belongs to another config ({'; '.join(differing)}); "
            "choose another --workdir, or repeat the run's own settings"
        )


class Checkpoints:
    """The states of one run on disk: the two latest, and the best by a loss."""

    def __init__(self, workdir: epath.Path, read_only: bool = False):
        """Open the checkpoints of a run; `read_only` leaves one that is still training in peace."""
        folder = (workdir / "checkpoints").resolve()
        best = {"best_fn": _finite_loss, "best_mode": "min"}
        if read_only:
            options = ocp.CheckpointManagerOptions(
                read_only=True, create=False, save_interval_steps=0, **best
            )
        else:
            # Synchronous, since a failed asynchronous last save would end a run with success; with
            # a folder to move to before deletion, since a kill amid one leaves half a step.
            options = ocp.CheckpointManagerOptions(
                enable_async_checkpointing=False,
                todelete_subdir="trash",
                cleanup_tmp_directories=True,
                save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [
                        checkpoint_managers.LatestN(n=2),
                        checkpoint_managers.BestN(
                            get_metric_fn=_finite_loss,
                            reverse=True,
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                **best,
            )
            (folder / "trash").rmtree(missing_ok=True)
        self._trash = folder / "trash"
        self._manager = ocp.CheckpointManager(folder, options=options)

    def latest_step(self) -> int | None:
        """Return the newest step on disk, None where there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Return the step with the lowest finite loss, or the newest if none has one."""
        return self._manager.best_step()

    def save(self, state: TrainState, notes: dict[str, Any], loss: float | None) -> None:
        """Save a state, with `notes` (JSON) beside it; a `loss` makes it a candidate for best."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes)
        )
        metrics = {"loss": math.inf if loss is None else float(loss)}
        self._manager.save(step, args=args, metrics=metrics, force=True)
        self._trash.rmtree(missing_ok=True)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Return the state and the notes of `step`; `like` gives tree, shapes and devices."""
        # Explicit devices, since the state may have been saved on others.
        default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default
            ),
            like,
        )
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), notes=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=args)
        return restored.state, restored.notes

    def close(self) -> None:
        """Release Orbax's threads."""
        self._manager.close()


def load_model(workdir: epath.PathLike, which: str = "best") -> tuple[Run, CharLSTM, Any]:
    """Return the run in `workdir`, its model, and the params of its 'best' or 'latest' state.

    The model of a run with model.recurrence=cudnn has 'fused', the same function of the same
    parameters, which runs everywhere.

    Raises:
      UserError: if the folder holds no run, or no checkpoint yet.
    """
    run = load_run(epath.Path(workdir))
    model = model_from_config(run.config, len(run.vocab))
    if model.recurrence == "cudnn":
        model = model.clone(recurrence="fused")
    optimizer = make_optimizer(run.config, num_steps=1)  # its state has the same tree for any
    make_state = partial(init_state, model, optimizer, batch_size=run.config.batch_size)
    with closing(Checkpoints(run.workdir, read_only=True)) as checkpoints:
        step = checkpoints.best_step() if which == "best" else checkpoints.latest_step()
        if step is None:
            raise UserError(f"{run.workdir}: no checkpoint yet; let it train on")
        state, _ = checkpoints.restore(step, jax.eval_shape(make_state, jax.random.key(0)))
    return run, model, state.params


def random_prompts(ids_M: np.ndarray, vocab: Vocab, length: int, seed: int) -> list[str]:
    """Return NUM_PROMPTS windows of `length` characters from random places of a text."""
    starts = np.random.default_rng((seed, NUM_PROMPTS)).integers(
        0, len(ids_M) - length + 1, size=NUM_PROMPTS
    )
    return [vocab.decode(ids_M[start : start + length]) for start in starts]


def _finite_loss(metrics: dict[str, float]) -> float:
    # One NaN would make Orbax forget the best checkpoint.
    return metrics["loss"] if math.isfinite(metrics["loss"]) else math.inf


def _read_json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); the run cannot be read") from None


def _versions() -> dict[str, str]:
    from importlib.metadata import version
    from platform import python_version

    names = ("charlstm", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
    return {"python": python_version()} | {name: version(name) for name in names}
