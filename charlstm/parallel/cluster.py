"""Join the processes of a cluster by jax.distributed, detect a dead one, and disconnect."""

import importlib.util
import logging
import os
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from charlstm.errors import UserError, one_line
from charlstm.parallel.native_output import aborts_explained, hard_exit, only_python_writes
from charlstm.parallel.processes import gather, is_first, is_shared

logger = logging.getLogger(__name__)

# A process without a heartbeat for this long counts as dead.
HEARTBEAT_SECONDS = 20
# Interval between queries of the coordination service.
WATCH_SECONDS = 3.0
# How long a process waits for the others before it disconnects: after success, and after an error,
# where the others may never arrive.
DONE_SECONDS = 60.0
FAILED_SECONDS = 3.0


class Cluster(NamedTuple):
    """A group of processes that can train one run."""

    name: str
    num_processes: int | None  # None: JAX detects it
    is_certain: bool = True  # False: JAX may detect no cluster


def find_cluster(variables: Mapping[str, str]) -> Cluster | None:
    """Return the cluster that JAX would detect from the environment `variables`."""

    def count(name: str) -> int | None:
        return int(word) if (word := variables.get(name, "")).isdecimal() else None

    slurm = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
    if "JAX_COORDINATOR_ADDRESS" in variables:
        return Cluster("JAX_COORDINATOR_ADDRESS", None)
    if "OMPI_MCA_orte_hnp_uri" in variables:
        return Cluster("Open MPI", count("OMPI_COMM_WORLD_SIZE"))
    if all(f"SLURM_{name}" in variables for name in slurm):
        return Cluster("Slurm", count("SLURM_NTASKS"))
    # Every pod has the first variable, but JAX joins only the pods of an indexed Job.
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= variables.keys():
        if importlib.util.find_spec("kubernetes"):
            return Cluster("Kubernetes", None)
        logger.warning(
            "this process trains alone: to join the other pods of the Kubernetes Job it needs the "
            "package kubernetes; pip install kubernetes"
        )
    if importlib.util.find_spec("libtpu"):
        return Cluster("Cloud TPU", None, is_certain=False)
    return None


@contextmanager
def joined(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> Iterator[None]:
    """Initialize jax.distributed within the block if there is a cluster.

    Without `coordinator`, JAX detects Cloud TPU, Slurm, Open MPI and Kubernetes. With
    `num_processes` 1, this process trains alone.

    Args:
      coordinator: HOST:PORT at which process 0 listens.
      num_processes: the number of processes.
      process_id: the number of this process, from 0.
      timeout: how many seconds to wait for the other processes.

    Raises:
      UserError: if the processes cannot connect.
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
    with aborts_explained(watch.message([0])), only_python_writes("stdout"):
        watch.start()
        connect()
        try:
            yield
        except Exception as error:
            # The runtime raises its own types if another process dies during an all-reduce.
            cause = error.__cause__ if isinstance(error, UserError) else error
            if isinstance(cause, ValueError | RuntimeError):
                watch.wait()
            watch.shutdown(FAILED_SECONDS)
            raise
        watch.shutdown(DONE_SECONDS)


def _join(cluster: Cluster, coordinator: str | None, process_id: int | None, timeout: int) -> bool:
    """Initialize jax.distributed; return whether there is a cluster.

    Raises:
      UserError: if the processes cannot connect.
    """
    who = "this process" if process_id is None else f"process {process_id}"
    if cluster.num_processes != 1 and cluster.is_certain:
        number = cluster.num_processes or "all"
        logger.info("%s: %s waits for %s processes to connect", cluster.name, who, number)
    remedy = (
        "start all of them with the same --coordinator and --num_processes and different "
        "--process_id, process 0 on the coordinator's host, where the port must be free; "
        "--num_processes=1 trains alone"
    )
    failed = f"{cluster.name}: {who} could not connect"
    # If a process is missing, the runtime prints pages and aborts; this timer fires before.
    waited = f"{cluster.name}: {who} waited {timeout} s for all processes to connect; {remedy}"
    alarm = threading.Timer(timeout, hard_exit, [waited])
    alarm.daemon = True
    alarm.start()
    # Without this, the runtime aborts before Watch can report which process is dead.
    with suppress(AttributeError):  # in a version of JAX without it
        jax.config.update("jax_enable_recoverability", True)
    try:
        with (
            only_python_writes("stderr"),
            aborts_explained(f"{failed}; {remedy}"),
            warnings.catch_warnings(),
        ):
            # With --coordinator, JAX does not need the package kubernetes.
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
    """Connect all devices of all processes by a first all-reduce.

    On CPUs all processes must start the first all-reduce within 30 seconds of each other. Later,
    one process may prepare a text or compile a program that another finds in its cache.
    """
    mesh = Mesh(np.array(jax.devices()), ("all",))
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    ones = np.ones(jax.local_device_count(), np.int32)
    array = jax.make_array_from_process_local_data(sharding, ones)
    total = jax.jit(jax.numpy.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(array)
    assert int(total) == jax.device_count()
    gather(0)


def client() -> Any:
    """Return the client of JAX's coordination service, which is not public: JAX may move it."""
    from jax._src import distributed

    return distributed.global_state.client


class Watch:
    """A thread that ends this process with one line if another process dies.

    Without it, this process would wait for ever in an all-reduce.
    """

    def __init__(self) -> None:
        self._indices = list(range(jax.process_count()))
        self._is_over = threading.Event()

    def start(self) -> None:
        """Start the thread, or warn if this JAX version has no such client."""
        try:
            first = client().get_live_nodes(self._indices)
        except (ImportError, AttributeError, TypeError):
            logger.warning(
                "this version of JAX cannot report a dead process: the other processes would wait "
                "for it; stop them by hand, or install another version of JAX"
            )
            return
        threading.Thread(target=self._run, args=[first], daemon=True).start()

    def wait(self) -> None:
        """Wait until the thread would have ended this process if another one were dead."""
        time.sleep(HEARTBEAT_SECONDS + 2 * WATCH_SECONDS)

    def shutdown(self, seconds: float) -> None:
        """Disconnect once all processes call this, or after `seconds`."""
        self._is_over.set()
        with suppress(Exception):  # JAX does not document the types
            client().wait_at_barrier("shutdown", int(seconds * 1000))
            # Process 0 hosts the service; if it disconnects first, the others abort.
            while is_first() and len(client().get_live_nodes(self._indices)) > 1:
                time.sleep(0.1)
        jax.distributed.shutdown()

    def message(self, dead: list[int]) -> str:
        """Return the line that reports the `dead` processes."""
        names = ", ".join(map(str, dead))
        return (
            f"process {names} of {len(self._indices)} is dead or does not answer: process "
            f"{jax.process_index()} exits, too; run the same command again on all to resume from "
            "the last checkpoint"
        )

    def _run(self, first: Mapping[int, Any]) -> None:
        while not self._is_over.wait(WATCH_SECONDS):
            try:
                live = client().get_live_nodes(self._indices)
                # A restarted process has another incarnation and does not know this run.
                dead = [index for index in self._indices if live.get(index) != first.get(index)]
            except Exception:  # JAX does not document the types
                dead = [0]  # process 0 hosts the service
            if dead and not self._is_over.is_set():
                hard_exit(self.message(dead))
