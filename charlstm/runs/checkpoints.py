"""Checkpoints of a run by Orbax: the two latest and the best, with a checksum of each leaf."""

import logging
import math
import re
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from charlstm.errors import DamagedError, RunError, UserError
from charlstm.exchange.reading import read_exported
from charlstm.files import check_readable, is_exported, is_local, plain_path
from charlstm.model import CharLSTM, model_of_run
from charlstm.optim import averaged_params, make_optimizer, make_schedule
from charlstm.parallel import processes
from charlstm.runs.checksums import (
    by_name,
    check_types,
    checksum_of,
    checksums,
    damaged,
    read_metadata,
    type_of,
)
from charlstm.runs.folder import Run, load_run
from charlstm.runs.orbax_calls import OrbaxError, call_orbax, without_warning
from charlstm.steps import TrainState, init_state
from charlstm.system.paths import model_path

logger = logging.getLogger(__name__)

# A damaged checkpoint is renamed to this prefix and its step.
DAMAGED = "damaged-"


class Checkpoints:
    """The checkpoints of one run: the two latest, and the one with the lowest loss."""

    def __init__(self, workdir: epath.Path, read_only: bool = False):
        """Open the checkpoints of a run.

        A writer renames those with damaged metadata to damaged-STEP and logs a warning. With
        `read_only` nothing is written, so that another process may train the run.

        Raises:
          DamagedError: if the metadata of one are damaged, for a reader.
        """
        self._folder = (workdir / "checkpoints").resolve()
        self._trash = self._folder / "trash"
        self._stack = ExitStack()
        if read_only:
            for step in steps_in(self._folder):
                read_metadata(self._folder / str(step))
        else:
            processes.run_on_all_processes(self._tidy_up)
            if is_local(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
        path = self._stack.enter_context(plain_path(self._folder))
        with without_warning("Given directory is read only"):
            self._manager = ocp.CheckpointManager(path, options=_manager_options(read_only))

    def latest_step(self) -> int | None:
        """Return the newest step on disk, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Return the step with the lowest finite loss, or the newest if no loss is finite."""
        return self._manager.best_step()

    def save(self, state: TrainState, metadata: dict[str, Any], loss: float | None) -> None:
        """Save a state and its `metadata` (JSON).

        If its step is saved already, overwrite it only when `loss` is given.

        Args:
          state: the state.
          metadata: what restore returns beside the state.
          loss: by which the best checkpoint is chosen; None if there was no evaluation.

        Raises:
          RunError: if the state cannot be saved; earlier checkpoints remain.
        """
        step = int(state.step)
        if loss is None and step in self._manager.all_steps():
            return
        loss = None if loss is None or not math.isfinite(loss) else float(loss)
        record = {
            "metadata": metadata,
            "loss": loss,
            "crc32": checksums(state),
            "types": by_name(type_of, state),
        }
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            metadata=ocp.args.JsonSave(record | {"checksum": checksum_of(record)}),
        )

        def replace() -> None:
            self._delete(low=step, high=step)
            metrics = {"loss": math.inf if loss is None else loss}
            self._manager.save(step, args=args, metrics=metrics, force=True)
            self._empty_trash()

        try:
            call_orbax(replace)
        except OrbaxError as error:
            raise RunError(
                f"{self._folder}/{step}: could not be saved ({error}); the checkpoint before it "
                "is kept: free some space, or repair the folder, and repeat the command"
            ) from error

    def restore(self, step: int, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Return the state and the metadata of `step`.

        Args:
          step: one with a checkpoint.
          abstract_state: tree, types and shardings of the state. An array without a sharding is
            restored to the first device of this process. ocp.PLACEHOLDER stands for an array that
            is not to be read.

        Raises:
          DamagedError: if a file is missing or has changed since it was written.
          UserError: if the saved state has another tree or other types.
          RunError: if a file cannot be read, or if there is too little memory.
        """
        folder = self._folder / str(step)
        record = read_metadata(folder)
        check_types(folder, record, abstract_state)
        # Explicit devices, since the state may have been saved on others.
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def with_sharding(leaf: Any) -> Any:
            if leaf is ocp.PLACEHOLDER:
                return leaf
            sharding = getattr(leaf, "sharding", None) or device
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        target = jax.tree.map(with_sharding, abstract_state)
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(target, restore_args))
        try:
            state = call_orbax(lambda: self._manager.restore(step, args=args).state)
        except OrbaxError as error:
            if error.lacks_memory:
                raise RunError(f"{folder}: could not be loaded ({error})") from error
            check_readable(folder)
            raise damaged(folder / "state", str(error)) from error
        # Orbax restores other types and flipped bits without an error.
        if by_name(type_of, state) != by_name(type_of, abstract_state):
            raise damaged(folder / "state", "it has other types")
        found, saved = checksums(state), record["crc32"]
        if differing := [name for name in found if found[name] != saved.get(name)]:
            raise damaged(folder / "state", f"the checksum of {', '.join(differing)} differs")
        return state, record["metadata"]

    def restore_newest(
        self,
        abstract_state: TrainState,
        is_wanted: Callable[[dict[str, Any]], bool] = lambda metadata: True,
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Return the newest state with wanted metadata, or None; delete newer ones.

        Damaged checkpoints are renamed to damaged-STEP, with a warning.

        Raises:
          UserError: if only damaged checkpoints are left, or if one has another tree or other
            types than `abstract_state`.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, metadata = self.restore(step, abstract_state)
            except DamagedError as error:
                processes.run_on_all_processes(partial(self._quarantine, step, error))
                self._manager.reload()
                continue
            if is_wanted(metadata):
                self._delete(low=step + 1)
                return state, metadata
        if names := damaged_in(self._folder):
            raise UserError(
                f"{self._folder}: all checkpoints are damaged; restore the files of "
                f"{', '.join(names)} and rename them to their step, or choose another --workdir; "
                "to start again here, which replaces the records of the run, delete them"
            )
        self._delete(low=0)
        return None

    def close(self) -> None:
        """Release Orbax's threads."""
        self._manager.close()
        self._stack.close()

    def _delete(self, low: int, high: float = math.inf) -> None:
        for step in list(self._manager.all_steps()):
            if low <= step <= high:
                self._manager.delete(step)
        self._empty_trash()

    def _tidy_up(self) -> None:
        if not processes.is_first():
            return
        for step in steps_in(self._folder):
            try:
                read_metadata(self._folder / str(step))
            except DamagedError as error:
                self._quarantine(step, error)
        self._empty_trash()

    def _empty_trash(self) -> None:
        if processes.is_first():
            self._trash.rmtree(missing_ok=True)

    def _quarantine(self, step: int, error: DamagedError) -> None:
        if not processes.is_first():
            return
        target = self._folder / f"{DAMAGED}{step}"
        while target.exists():  # from an earlier start
            target = self._folder / f"{target.name}-too"
        logger.warning("%s; renamed to %s and not used", error, target.name)
        (self._folder / str(step)).rename(target)


@jax.transfer_guard("allow")
def load_model(workdir: epath.PathLike, which: str = "best") -> tuple[Run, CharLSTM, Any]:
    """Return a run, its model, and the params of its 'best' or 'latest' checkpoint.

    They are the averaged params if the run averages them. The recurrence is one that can run here.
    The run may be in training.

    Args:
      workdir: the run folder, an exported model (see charlstm.exchange.reading), or the string
        'builtin' for the small model in the package.
      which: 'best' or 'latest'; an exported model has one set of weights, which is the best.

    Raises:
      UserError: if there is no run, no checkpoint yet, or no exported model that can be read.
      DamagedError: if a file is missing or has changed since it was written.
    """
    path = model_path(workdir)
    if is_exported(path):
        if which != "best":
            raise UserError(
                f"{path}: an exported model has one set of weights; leave out --checkpoint={which}"
            )
        exported = read_exported(path)
        return exported.run, exported.model, exported.params
    run = load_run(path)
    model = model_of_run(run.config, run.vocab)
    optimizer = make_optimizer(run.config, make_schedule(run.config, num_steps=1))
    make_state = partial(init_state, model, optimizer, batch_size=run.config.batch_size)
    # Inside the trace, the key is not compiled, which takes a third of the start-up time.
    abstract_state = only_params(jax.eval_shape(lambda: make_state(run.key(0))))
    folder = run.workdir / "checkpoints"
    while True:
        steps_before = steps_in(folder)
        try:
            with closing(Checkpoints(run.workdir, read_only=True)) as checkpoints:
                step = checkpoints.best_step() if which == "best" else checkpoints.latest_step()
                if step is not None:
                    state, _ = checkpoints.restore(step, abstract_state)
                    return run, model, averaged_params(state.params, state.opt_state)
        except (DamagedError, OSError):
            # A trainer may have deleted the checkpoint during the read.
            if steps_before == steps_in(folder):
                raise
        else:
            if names := damaged_in(folder):
                raise DamagedError(
                    f"{run.workdir}: all checkpoints are damaged; restore the files of "
                    f"{', '.join(names)} and rename them to their step, or train again"
                )
            raise UserError(f"{run.workdir}: no checkpoint yet; let it train on")


def only_params(abstract_state: TrainState) -> TrainState:
    """Return `abstract_state` with ocp.PLACEHOLDER for each leaf not needed by averaged_params."""
    needed = jax.tree.leaves(averaged_params(abstract_state.params, abstract_state.opt_state))
    ids = set(map(id, needed))
    return jax.tree.map(lambda leaf: leaf if id(leaf) in ids else ocp.PLACEHOLDER, abstract_state)


def steps_in(folder: epath.Path) -> list[int]:
    """Return the steps that have a checkpoint in `folder`."""
    if not folder.exists():
        return []
    names = [path.name for path in folder.iterdir()]
    return sorted(int(name) for name in names if re.fullmatch(r"[0-9]{1,18}", name))


def damaged_in(folder: epath.Path) -> list[str]:
    """Return the names of the damaged checkpoints in `folder`."""
    if not folder.exists():
        return []
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(DAMAGED))


def _manager_options(read_only: bool) -> ocp.CheckpointManagerOptions:
    best = {"best_fn": _finite_loss, "best_mode": "min"}
    if read_only:
        return ocp.CheckpointManagerOptions(
            read_only=True, create=False, save_interval_steps=0, **best
        )
    two_latest = checkpoint_managers.LatestN(n=2)
    best_one = checkpoint_managers.BestN(
        get_metric_fn=_finite_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    return ocp.CheckpointManagerOptions(
        # The failure of an asynchronous last save would go unnoticed.
        enable_async_checkpointing=False,
        # Checkpoints are moved before their deletion, since a kill would leave half of one.
        todelete_subdir="trash",
        cleanup_tmp_directories=True,
        save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
        preservation_policy=checkpoint_managers.AnyPreservationPolicy([two_latest, best_one]),
        **best,
    )


def _finite_loss(metrics: dict[str, float]) -> float:
    # With one NaN among the losses Orbax would lose the best checkpoint.
    return metrics["loss"] if math.isfinite(metrics["loss"]) else math.inf
