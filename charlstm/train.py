"""The training loop, around the pure steps."""

import logging
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from charlstm.checkpoint import Checkpoints
from charlstm.config import validate
from charlstm.data import read_steps
from charlstm.errors import UserError
from charlstm.job import Job, prepare, report, steps_ahead
from charlstm.journal import Journal
from charlstm.log import bits
from charlstm.model import CharLSTM, model_from_config, zero_carry
from charlstm.optim import make_optimizer, make_schedule
from charlstm.sample import stream
from charlstm.steps import (
    evaluate,
    init_state,
    make_eval_step,
    make_train_step,
    make_train_steps,
)

logger = logging.getLogger(__name__)


def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train, or go on training, the run in `workdir`; return whether it is finished.

    Args:
      config: the settings; those of a run that is there already must be the same.
      workdir: the run folder, made if need be.
      should_stop: asked several times a second, or after every step if it takes longer; once true,
        all is saved and the function returns.

    Raises:
      UserError: for a senseless setting, a text that can't be used, a folder of another run.
      RunError: if the loss is not finite.
    """
    validate(config)
    check_backend(config)
    job = prepare(config, epath.Path(workdir))
    model = model_from_config(config, len(job.run.vocab))
    optimizer = make_optimizer(config, job.num_steps)
    schedule = make_schedule(config, job.num_steps)
    make_state = partial(init_state, model, optimizer, batch_size=config.batch_size)
    train_steps = jax.jit(make_train_steps(make_train_step(model, optimizer)), donate_argnums=0)
    assess = make_assessment(job, model)
    with closing(Checkpoints(job.run.workdir)) as checkpoints:
        state = jax.jit(make_state)(jax.random.key(config.seed))
        notes: dict[str, Any] = {}
        latest = checkpoints.latest_step()
        if latest is not None:
            state, notes = checkpoints.restore(latest, like=state)
        num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        report(job, int(state.step), num_params, ", ".join(map(str, jax.devices())))
        if state.step >= job.num_steps:
            logger.info("finished already, at step %d: nothing to do", state.step)
            return True

        with Journal(job, checkpoints, int(state.step), notes) as journal:
            step = int(state.step)
            while step < job.num_steps:
                count = min(journal.fitting_count, job.max_count, steps_ahead(job, step))
                batches = read_steps(job.batches, step, count, job.max_count)
                state, metrics = train_steps(state, batches, count)
                step += count
                journal.push(step, count, metrics)
                is_last = step == job.num_steps
                stopping = should_stop() and not is_last
                if is_last or step % job.log_every == 0:
                    journal.log_training(step, float(schedule(step - 1)))
                if is_last or step % job.eval_every == 0:
                    journal.log_evaluation(state, assess(state.params, step))
                elif stopping or step % job.save_every == 0:
                    journal.save(state)
                if stopping:
                    logger.info("stopped and saved at step %d; the same command goes on", step)
                    return False
            journal.report_end()
    return True


def check_backend(config: ConfigDict) -> None:
    """Raise UserError if `config` asks for what the machine does not have."""
    if config.model.recurrence == "cudnn" and jax.default_backend() != "gpu":
        raise UserError(
            "config.model.recurrence=cudnn: needs an NVIDIA GPU, and JAX has found "
            f"{jax.default_backend()}; use fused"
        )


def make_assessment(job: Job, model: CharLSTM) -> Callable[[Any, int], dict[str, Any]]:
    """Return assess(params, step) -> what an evaluation tells: validation figures and a sample."""
    config, run = job.run.config, job.run
    eval_step = jax.jit(make_eval_step(model))

    def assess(params: Any, step: int) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        if job.val_batches:
            carry = zero_carry(model, job.val_batches.batch_size)
            indices = range(job.val_batches.steps_per_epoch)
            result = evaluate(eval_step, params, carry, map(job.val_batches, indices))
            figures = {
                "val/loss": result["loss"],
                "val/bits_per_char": bits(result["loss"]),
                "val/accuracy": result["accuracy"],
            }
        place = np.random.default_rng((config.seed, step)).integers(len(run.prompts))
        prompts = [run.vocab.encode(run.prompts[place])]
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        pieces = stream(
            model, params, prompts, key, seq_len=config.seq_len, **config.sample.to_dict()
        )
        return figures | {"sample": run.vocab.decode(np.concatenate(list(pieces), axis=1)[0])}

    return assess
