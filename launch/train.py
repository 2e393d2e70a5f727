"""Train a character model, or resume a run.

  python launch/train.py [--config=NAME or FILE] [--workdir=DIR] [--config.KEY=VALUE ...]

Without flags: configs/default.py on Dracula, in runs/default-pg345. charlstm/config.py describes
the settings. The same command again resumes the run. Fine-tuning starts from a trained run:

  python launch/train.py --config.init_from=RUN --config.data.path=OTHER.txt

Several processes train one run if JAX finds a cluster (Cloud TPU, Slurm, Open MPI, Kubernetes), or
if flags describe one:

  python launch/train.py --coordinator=HOST:PORT --num_processes=N --process_id=0 to N-1
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
import logging
import signal

from absl import flags

from charlstm.cli import folders, options
from charlstm.errors import OccupiedError, UserError
from charlstm.system.paths import BUILTIN

CONFIG = options.define_config()
WORKDIR = flags.DEFINE(
    options.ANY_PATH, "workdir", "", "the run folder; runs/CONFIG-TEXT if not given"
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT where process 0 waits for the others"
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "the number of processes; 1: no cluster", lower_bound=1
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "the number of this process, from 0", lower_bound=0
)
JOIN_TIMEOUT = flags.DEFINE_integer(
    "join_timeout", 300, "seconds to wait for the other processes", lower_bound=1
)
PROFILE = flags.DEFINE_boolean(
    "profile", False, "write a trace of some steps to profile/ in the run folder"
)


def check_cluster_flags(coordinator: str | None, size: int | None, index: int | None) -> None:
    """Raise UserError if the flags of a cluster are invalid or incomplete."""
    if coordinator is None and index is None and size in (None, 1):
        return
    if coordinator is None or size is None or index is None:
        raise UserError("--coordinator, --num_processes, --process_id: give all three or none")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={coordinator}: must be HOST:PORT")
    if index >= size:
        raise UserError(f"--process_id={index}: must be below --num_processes={size}")


def main() -> int:
    """Train the run that the flags describe; return the exit code."""
    config = options.checked_config(CONFIG)
    members = COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
    check_cluster_flags(*members)
    if WORKDIR.value == BUILTIN:
        raise UserError(
            f"--workdir={BUILTIN}: is the model in the package; choose another --workdir, and "
            f"--config.init_from={BUILTIN} to start from its weights"
        )
    from charlstm.parallel import cluster, processes  # late, because JAX is slow to import
    from charlstm.system.console import launcher_command, show_logs

    show_logs(progress_on_stdout=True)
    with cluster.joined(*members, JOIN_TIMEOUT.value), app.StopSignal() as stop:
        from charlstm.training.loop import train

        if not processes.is_first():
            logging.getLogger("charlstm").setLevel(logging.ERROR)  # process 0 logs for all
        workdir = WORKDIR.value or folders.default_workdir(
            options.config_name(CONFIG), config.data.path
        )
        try:
            unset = options.unset_settings(CONFIG)
            finished = train(config, workdir, stop, profile=PROFILE.value, unset=unset)
        except OccupiedError as error:
            words = folders.in_free_workdir(app.GIVEN_FLAGS, workdir)
            command = launcher_command("train", *words)
            raise UserError(f"{error}, for example: {command}") from error
    # The signal may have come to another process.
    return 0 if finished else 128 + (stop.number or signal.SIGTERM)


if __name__ == "__main__":
    app.run(main, "--config=tiny --config.data.path=book.txt")
