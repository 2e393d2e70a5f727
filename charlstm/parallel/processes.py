"""Several processes as one run. JAX's own runtime connects them; here they agree and part.

Every function is to be called by all processes alike. Where there is one process, they do nothing.
"""

import importlib.util
import logging
import os
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from charlstm.errors import RunError, UserError, one_line
from charlstm.system.native_output import aborts_explained, end_at_once, only_python_writes

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# A process that has been silent for so long is taken for dead.
HEARTBEAT_SECONDS = 20
# Seconds between queries of the coordination service.
WATCH_SECONDS = 3.0
# How long a process waits for the others when it is done, and when it has failed: with them, or
# alone, in which case they wait for it.
DONE_SECONDS = 60.0
FAILED_SECONDS = 3.0


class Cluster(NamedTuple):
    """The processes that may train one run."""

    name: str
    num_processes: int | None  # None: JAX finds out
    is_certain: bool = True  # otherwise there may be one, and JAX has to look


def find_cluster(variables: Mapping[str, str]) -> Cluster | None:
    """Return the cluster that JAX would join by itself, by the `variables` of the environment."""

    def count(name: str) -> int | None:
        return int(word) if (word := variables.get(name, "")).isdecimal() else None

    slurm = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
    if "JAX_COORDINATOR_ADDRESS" in variables:
        return Cluster("JAX_COORDINATOR_ADDRESS", None)
    if "OMPI_MCA_orte_hnp_uri" in variables:
        return Cluster("Open MPI", count("OMPI_COMM_WORLD_SIZE"))
    if all(f"SLURM_{name}" in variables for name in slurm):
        return Cluster("Slurm", count("SLURM_NTASKS"))
    # Any pod has the first variable; JAX joins the pods of an indexed Job only.
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= variables.keys():
        if importlib.util.find_spec("kubernetes"):
            return Cluster("Kubernetes", None)
        logger.warning(
            "the pods of a Kubernetes Job can train together, but the package kubernetes is not "
            "installed: this process trains alone; to join the others: pip install kubernetes"
        )
    if importlib.util.find_spec("libtpu"):
        return Cluster("Cloud TPU", None, is_certain=False)
    return None


@contextmanager
def joined(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> Iterator[None]:
    """Be one of the processes of a cluster within the block, if one is named or JAX finds one.

    Without arguments jax.distributed looks for one: Cloud TPU, Slurm, Open MPI, Kubernetes. With 1
    for `num_processes` this process stays alone.

    Args:
      coordinator: HOST:PORT at which process 0 listens.
      num_processes, process_id: how many there are, and which this is, from 0.
      timeout: how many seconds to wait for the others.

    Raises:
      UserError: if the arguments do not fit together.
    """
    if num_processes == 1:
        yield
        return
    if coordinator is None:
        found = find_cluster(os.environ)
    else:
        found = Cluster(f"--coordinator={coordinator}", num_processes)
    if found is None or not _join(found, coordinator, process_id, timeout) or not is_shared():
        yield
        return
    watch = Watch()
    # Gloo prints each connection on stdout.
    with aborts_explained(watch.last_message(0)), only_python_writes("stdout"):
        watch.start()
        connect()
        try:
            yield
        except Exception as error:
            # The runtime raises its own types if another process dies during an all-reduce.
            cause = error.__cause__ if isinstance(error, UserError) else error
            if isinstance(cause, ValueError | RuntimeError):
                watch.await_verdict()
            watch.leave(FAILED_SECONDS)
            raise
        watch.leave(DONE_SECONDS)


def _join(cluster: Cluster, coordinator: str | None, process_id: int | None, timeout: int) -> bool:
    """Join a cluster; return whether there is one.

    Raises:
      UserError: if that fails.
    """
    who = "this process" if process_id is None else f"process {process_id}"
    if cluster.num_processes != 1 and cluster.is_certain:
        number = cluster.num_processes or "all"
        logger.info("%s: %s waits for %s processes to meet", cluster.name, who, number)
    remedy = (
        "start all of them, process 0 on the coordinator's host, with the same --coordinator and "
        "--num_processes, and a --process_id of its own for each; the port must be free there; "
        "--num_processes=1 trains alone"
    )
    failed = f"{cluster.name}: {who} could not join"
    # Where a process is missing the runtime aborts, with pages of its own; this comes before.
    waited = f"{cluster.name}: {who} has waited {timeout} s for all processes to meet; {remedy}"
    alarm = threading.Timer(timeout, end_at_once, [waited])
    alarm.daemon = True
    alarm.start()
    # Otherwise the runtime aborts a process that has lost another before the watch reports it.
    jax.config.update("jax_enable_recoverability", True)
    try:
        with (
            only_python_writes("stderr"),
            aborts_explained(f"{failed}; {remedy}"),
            warnings.catch_warnings(),
        ):
            # Processes that flags name need no package to be found.
            warnings.filterwarnings("ignore", message="Kubernetes environment detected")
            jax.distributed.initialize(
                coordinator,
                cluster.num_processes if coordinator else None,
                process_id,
                initialization_timeout=timeout + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except (ValueError, RuntimeError) as error:
        if isinstance(error, ValueError) and not cluster.is_certain:
            return False
        raise UserError(f"{failed} ({one_line(error)}); {remedy}") from error
    finally:
        alarm.cancel()
    return True


def connect() -> None:
    """Let all devices of all processes find each other now.

    On CPUs the first sum over them has to begin everywhere within 30 seconds, and one process may
    have a text to prepare or a program to compile that another finds done.
    """
    mesh = Mesh(np.array(jax.devices()), ("all",))
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    ones = np.ones(jax.local_device_count(), np.int32)
    array = jax.make_array_from_process_local_data(sharding, ones)
    total = jax.jit(jax.numpy.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(array)
    assert int(total) == jax.device_count()
    gather(0)


def is_shared() -> bool:
    """Return whether several processes train the run."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Return whether this process is the one that writes logs, samples and pictures."""
    return jax.process_index() == 0


def together(work: Callable[[], Result]) -> Result:
    """Return what `work` gives here, once it is done everywhere; if it fails on one, all fail.

    Raises:
      UserError: that of `work`, or one that names the process on which it failed.
    """
    error: UserError | None = None
    try:
        result = work()
    except UserError as failure:
        error = failure
    failed = gather(0 if error is None else error.exit_code)
    if error is not None:
        raise error
    if failed.any():
        which, code = int(np.argmax(failed > 0)), int(failed.max())
        message = f"process {which} of {len(failed)} could not go on: its own message says why"
        raise RunError(message) if code == RunError.exit_code else UserError(message)
    return result


def agree(should_stop: Callable[[], bool]) -> Callable[[], bool]:
    """Return a should_stop that is true on all processes once `should_stop` is on one of them."""
    if not is_shared():
        return should_stop
    return lambda: bool(gather(int(should_stop())).any())


def least(value: int) -> int:
    """Return the least of the `value` of all processes."""
    return int(gather(value).min())


def check_same(settings: dict[str, Any]) -> None:
    """Raise UserError, naming them, if `settings` are not the same on all processes."""
    lengths = gather(len(settings))
    if len(set(lengths.tolist())) > 1:
        raise UserError("the processes run different versions of charlstm; install one on all")
    sums = [zlib.crc32(f"{name}={value!r}".encode()) for name, value in settings.items()]
    all_sums = gather(sums)
    differing = [
        name for name, column in zip(settings, all_sums.T, strict=True) if len(set(column)) > 1
    ]
    if differing:
        others = [
            str(index) for index, row in enumerate(all_sums) if not np.array_equal(row, all_sums[0])
        ]
        raise UserError(
            f"{', '.join(differing)}: not the same on process 0 and on {', '.join(others)}; give "
            "all processes the same flags, files and versions"
        )


def gather(value: Any) -> np.ndarray:
    """Return the numbers of all processes, process by process; they are of 32 bits, unsigned."""
    return process_allgather(np.asarray(value, np.uint32))


def client() -> Any:
    """Return JAX's client of its distributed runtime, None if this version hides it elsewhere."""
    try:
        from jax._src import distributed

        return distributed.global_state.client
    except (ImportError, AttributeError):
        return None


class Watch:
    """A thread that exits this process with one line when another one is dead.

    Without it a process would wait for ever in a sum to which another no longer adds.
    """

    def __init__(self) -> None:
        self._everybody = list(range(jax.process_count()))
        self._is_over = threading.Event()

    def start(self) -> None:
        """Watch the processes that are there now."""
        if client() is None:
            logger.warning(
                "with this version of JAX a process that dies is not noticed: the others wait "
                "for it until you stop them"
            )
            return
        threading.Thread(target=self._run, daemon=True).start()

    def leave(self, seconds: float) -> None:
        """Disconnect once all processes have arrived, or after a timeout."""
        self._is_over.set()
        with suppress(Exception):  # of types that are not documented
            client().wait_at_barrier("leave", int(seconds * 1000))
            # Process 0 hosts the service; without it the others would abort.
            while is_first() and len(client().get_live_nodes(self._everybody)) > 1:
                time.sleep(0.1)
        jax.distributed.shutdown()

    def await_verdict(self) -> None:
        """Wait for so long that the watch would have ended this process, had another one gone."""
        time.sleep(HEARTBEAT_SECONDS + 2 * WATCH_SECONDS)

    def last_message(self, *gone: int) -> str:
        """Return the line that names the processes that have gone."""
        names = ", ".join(map(str, gone))
        return (
            f"process {names} of {len(self._everybody)} has gone or does not answer: process "
            f"{jax.process_index()} ends, too; give all the same command again, which goes on from "
            "the last checkpoint"
        )

    def _run(self) -> None:
        met = client().get_live_nodes(self._everybody)
        while not self._is_over.wait(WATCH_SECONDS):
            try:
                there = client().get_live_nodes(self._everybody)
                # A restarted process has another incarnation and does not know this run.
                gone = [index for index in self._everybody if there.get(index) != met.get(index)]
            except Exception:  # of types that are not documented
                gone = [0]  # which holds the line
            if gone and not self._is_over.is_set():
                end_at_once(self.last_message(*gone))
