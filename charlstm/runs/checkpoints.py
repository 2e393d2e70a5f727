"""The states of a run on disk, by Orbax: the two latest and the best, each leaf with a checksum."""

import logging
import math
import os
import re
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from charlstm.errors import DamagedError, RunError, UserError
from charlstm.files import check_readable, is_local, plain_path
from charlstm.model import CharLSTM, model_from_config
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
from charlstm.system.paths import given_path

logger = logging.getLogger(__name__)

# What the name of a damaged checkpoint begins with, before its step.
ASIDE = "damaged-"


class Checkpoints:
    """The states of one run on disk: the two latest, and the best by a loss."""

    def __init__(self, workdir: epath.Path, read_only: bool = False):
        """Open the checkpoints of a run; `read_only` leaves one that is still training in peace.

        A writer sets damaged ones aside, as damaged-STEP, with a warning.

        Raises:
          DamagedError: if one is damaged, for a reader.
        """
        self._folder = (workdir / "checkpoints").resolve()
        self._trash = self._folder / "trash"
        self._stack = ExitStack()
        if read_only:
            for step in steps_in(self._folder):
                read_metadata(self._folder / str(step))
        else:
            processes.together(self._tidy_up)
        best = {"best_fn": _finite_loss, "best_mode": "min"}
        if read_only:
            options = ocp.CheckpointManagerOptions(
                read_only=True, create=False, save_interval_steps=0, **best
            )
        else:
            # Synchronous, since a failed asynchronous last save would end a run with success; with
            # a folder to move to before deletion, as a kill would leave half a step.
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
        if not read_only and is_local(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        literal = self._stack.enter_context(plain_path(self._folder))
        with without_warning("Given directory is read only"):
            self._manager = ocp.CheckpointManager(literal, options=options)

    def latest_step(self) -> int | None:
        """Return the newest step on disk, None where there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Return the step with the lowest finite loss, or the newest if none has one."""
        return self._manager.best_step()

    def save(self, state: TrainState, metadata: dict[str, Any], loss: float | None) -> None:
        """Save a state, with `metadata` (JSON) beside it; a `loss` makes it a candidate for best.

        If the state is on disk already, it gives way to one with a `loss`, and to none without.

        Raises:
          RunError: if that fails, as on a full disk; what was saved before is still there.
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
                f"{self._folder}/{step}: could not be saved ({error}); the checkpoint "
                "before it is kept: make room, or mend the folder, and give the same command again"
            ) from error

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Return the state and the metadata of `step`; `like` gives tree, types and shardings.

        Without a sharding an array comes to the first device of this process. A leaf of `like` that
        is ocp.PLACEHOLDER stays one, and is not read.

        Raises:
          DamagedError: if they are not what was saved.
          UserError: if what was saved has another tree or other types than `like`.
          RunError: if they cannot be read, for want of permission or memory.
        """
        folder = self._folder / str(step)
        record = read_metadata(folder)
        check_types(folder, record, like)
        # Explicit devices, since the state may have been saved on others.
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def placed(leaf: Any) -> Any:
            if leaf is ocp.PLACEHOLDER:
                return leaf
            sharding = getattr(leaf, "sharding", None) or default
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        abstract = jax.tree.map(placed, like)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(abstract, restore_args))
        try:
            state = call_orbax(lambda: self._manager.restore(step, args=args).state)
        except OrbaxError as error:
            if error.lacks_memory:
                raise RunError(f"{folder}: could not be loaded ({error})") from error
            check_readable(folder)
            raise damaged(folder / "state", str(error)) from error
        # Orbax itself restores other types, and flipped bits, without a word.
        if by_name(type_of, state) != by_name(type_of, like):
            raise damaged(folder / "state", "it has other types")
        saved = record["crc32"]
        found = checksums(state)
        if differing := [name for name in found if found[name] != saved.get(name)]:
            reason = f"the checksum of {', '.join(differing)} differs"
            raise damaged(folder / "state", reason)
        return state, record["metadata"]

    def restore_newest(
        self, like: TrainState, is_wanted: Callable[[dict[str, Any]], bool] = lambda metadata: True
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Return the newest state whose metadata are wanted, or None; newer ones are deleted.

        Damaged ones are set aside, with a warning.

        Raises:
          UserError: if there is none and damaged ones are set aside, by this start or an earlier
            one; or if one was saved with another tree or other types than `like`.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, metadata = self.restore(step, like)
            except DamagedError as error:
                processes.together(partial(self._set_aside, step, error))
                self._manager.reload()
                continue
            if is_wanted(metadata):
                self._delete(low=step + 1)
                return state, metadata
        if aside := set_aside_in(self._folder):
            raise UserError(
                f"{self._folder}: no checkpoint is left that is not damaged; bring the files of "
                f"{', '.join(aside)} back under the step's number, choose another --workdir to "
                "begin anew, or delete them to begin anew here, which replaces the run's records"
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
                self._set_aside(step, error)
        self._empty_trash()

    def _empty_trash(self) -> None:
        if processes.is_first():
            self._trash.rmtree(missing_ok=True)

    def _set_aside(self, step: int, error: DamagedError) -> None:
        if not processes.is_first():
            return
        aside = self._folder / f"{ASIDE}{step}"
        while aside.exists():  # from an earlier start
            aside = self._folder / f"{aside.name}-too"
        logger.warning("%s; set aside as %s, and not used", error, aside.name)
        (self._folder / str(step)).rename(aside)


@jax.transfer_guard("allow")
def load_model(workdir: epath.PathLike, which: str = "best") -> tuple[Run, CharLSTM, Any]:
    """Return the run in `workdir`, its model, and the params of its 'best' or 'latest' state.

    The params are the averaged ones where the run averages them.

    The model of a run with model.recurrence=cudnn has 'fused', the same function of the same
    parameters, which runs everywhere. The run may be training still.

    Raises:
      UserError: if the folder holds no run, or no checkpoint yet.
      DamagedError: if what it holds is not as it was written.
    """
    run = load_run(epath.Path(given_path(os.fspath(workdir))))
    model = model_from_config(run.config, run.vocab)
    if model.recurrence == "cudnn":
        model = model.clone(recurrence="fused")
    like = state_shapes(run.config, model, run.prng_impl)
    while True:
        before = steps_in(run.workdir / "checkpoints")
        try:
            with closing(Checkpoints(run.workdir, read_only=True)) as checkpoints:
                step = checkpoints.best_step() if which == "best" else checkpoints.latest_step()
                if step is None and (aside := set_aside_in(run.workdir / "checkpoints")):
                    raise DamagedError(
                        f"{run.workdir}: no checkpoint is left that is not damaged; bring the "
                        f"files of {', '.join(aside)} back under the step's number, or train again"
                    )
                if step is None:
                    raise UserError(f"{run.workdir}: no checkpoint yet; let it train on")
                state, _ = checkpoints.restore(step, only_params(like))
                return run, model, averaged_params(state.params, state.opt_state)
        except (DamagedError, OSError):
            # A trainer may have deleted what was being read.
            if before == steps_in(run.workdir / "checkpoints"):
                raise


def state_shapes(config: ConfigDict, model: CharLSTM, prng_impl: str | None = None) -> TrainState:
    """Return the state of a run with a jax.ShapeDtypeStruct for each array.

    `prng_impl` is the kind of its random key, by default JAX's own default.
    """
    optimizer = make_optimizer(config, make_schedule(config, num_steps=1))
    make_state = partial(init_state, model, optimizer, batch_size=config.batch_size)
    return jax.eval_shape(make_state, jax.random.key(0, impl=prng_impl))


def only_params(like: TrainState) -> TrainState:
    """Return `like` with ocp.PLACEHOLDER for all that averaged_params does not take from it."""
    wanted = set(map(id, jax.tree.leaves(averaged_params(like.params, like.opt_state))))
    return jax.tree.map(lambda leaf: leaf if id(leaf) in wanted else ocp.PLACEHOLDER, like)


def steps_in(folder: epath.Path) -> list[int]:
    """Return the steps that have a checkpoint in `folder`."""
    if not folder.exists():
        return []
    names = [path.name for path in folder.iterdir()]
    return sorted(int(name) for name in names if re.fullmatch(r"[0-9]{1,18}", name))


def set_aside_in(folder: epath.Path) -> list[str]:
    """Return the names of the checkpoints in `folder` that were set aside as damaged."""
    if not folder.exists():
        return []
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(ASIDE))


def _finite_loss(metrics: dict[str, float]) -> float:
    # One NaN would make Orbax forget the best one.
    return metrics["loss"] if math.isfinite(metrics["loss"]) else math.inf
