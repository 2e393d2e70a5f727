"""Several processes of one run, on this machine: connected over loopback by Gloo."""

import logging
import signal
import socket
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import pytest
from etils import epath
from helpers import assert_runs_close, assert_stopped, random_params
from launching import TRAINING, WarmLauncher

from charlstm.data.vocab import Vocab
from charlstm.exchange import safetensors
from charlstm.exchange.folder import as_trained
from charlstm.model import model_from_config
from charlstm.parallel import cluster, processes
from charlstm.runs.checkpoints import steps_in
from charlstm.runs.folder import load_run
from configs.tiny import get_config

FLAGS = [
    "--config=tiny",
    "--config.num_steps=20",
    "--config.log_every_steps=5",
    "--config.eval_every_steps=5",
    "--config.patience=9",  # all processes agree on an early stop
    "--config.sample.length=40",
    # test_sharding.py trains the other parts of the default recipe.
    "--config.optimizer.learning_rate=2e-3",
    "--config.optimizer.name=adamw",
    "--config.optimizer.schedule=constant",
    "--config.optimizer.warmup_steps=10",
    "--config.model.recurrent_rms_norm=false",
    "--config.model.multiplicative=false",
    "--config.data.path=book.txt",
    # Its text has other characters, so that some weights are initial ones.
    "--config.init_from=trained.safetensors",
]


def by_flags(port, size, index):
    """Return the flags that describe a cluster, and no variables."""
    where = f"--coordinator=127.0.0.1:{port}", f"--num_processes={size}", f"--process_id={index}"
    return where, {}


def by_slurm(port, size, index):
    """Return no flags, and the variables that srun sets."""
    names = {"NTASKS": size, "PROCID": index, "LOCALID": index, "STEP_NODELIST": "localhost"}
    surroundings = {f"SLURM_{name}": str(value) for name, value in names.items()}
    return [], surroundings | {"SLURM_JOB_ID": "1", "JAX_COORDINATOR_PORT": str(port)}


def by_open_mpi(port, size, index):
    """Return no flags, and the variables that mpirun sets."""
    names = {"SIZE": size, "RANK": index, "LOCAL_RANK": index}
    surroundings = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in names.items()}
    uri = "4096.0;tcp://127.0.0.1:1"
    return [], surroundings | {"OMPI_MCA_orte_hnp_uri": uri, "JAX_COORDINATOR_PORT": str(port)}


class Processes:
    """The processes of one run of launch/train.py."""

    def __init__(
        self,
        launch,
        folder,
        flags,
        size=2,
        num_devices=1,
        flags_of_last=(),
        place=by_flags,
        variables=(),
    ):
        """Start them; place(port, size, index) returns flags and environment of one of them."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        common = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"}
        common |= dict(variables)
        self.errors = [Path(tempfile.mkdtemp(dir=folder), "out") for _ in range(size)]
        self.processes = []
        for index, path in enumerate(self.errors):
            path.touch()
            own = flags_of_last if index == size - 1 else []
            where, surroundings = place(port, size, index)
            started = launch.start(
                "train",
                *flags,
                *where,
                *own,
                cwd=folder,
                out=path,
                env=common | surroundings,
            )
            self.processes.append(started)

    def wait(self, seconds=120):
        """Wait until all have ended; return their exit codes."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(1, deadline - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def wait_for_step(self, workdir, step, seconds=90):
        """Wait until the latest checkpoint has reached `step`."""
        self._wait_for(lambda: latest_step(workdir) >= step, seconds)

    def wait_for_line(self, index, beginning, seconds=90):
        """Wait until one process has printed a line with this beginning."""
        self._wait_for(lambda: f"\n{beginning}" in self.said(index), seconds)

    def _wait_for(self, condition, seconds):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.said(0)
            assert self.processes[0].poll() is None, self.said(0)
            time.sleep(0.05)

    def said(self, index):
        """Return what one process has printed, without the line that it waits for the others."""
        lines = self.errors[index].read_text().splitlines(keepends=True)
        return "".join(line for line in lines if " waits for " not in line)


def latest_step(workdir):
    return max(steps_in(epath.Path(workdir) / "checkpoints"), default=0)


SLURM = by_slurm(1, 2, 0)[1]
OPEN_MPI = by_open_mpi(1, 2, 0)[1]
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
INDEXED_JOB = POD | {"JOB_COMPLETION_INDEX": "0"}


@pytest.mark.parametrize(
    ("variables", "packages", "found"),
    [
        ({}, (), None),
        (SLURM, (), ("Slurm", 2, True)),
        (SLURM | {"SLURM_NTASKS": ""}, (), ("Slurm", None, True)),
        ({k: v for k, v in SLURM.items() if k != "SLURM_PROCID"}, (), None),  # in salloc's shell
        (OPEN_MPI, (), ("Open MPI", 2, True)),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, (), ("JAX_COORDINATOR_ADDRESS", None, True)),
        (POD, ("kubernetes",), None),
        (INDEXED_JOB, ("kubernetes",), ("Kubernetes", None, True)),
        (INDEXED_JOB, (), None),
        ({}, ("libtpu",), ("Cloud TPU", None, False)),
    ],
)
def test_find_cluster_reads_the_environment(variables, packages, found, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("charlstm"), "propagate", True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in packages or None)
    assert cluster.find_cluster(variables) == found
    is_missed = variables == INDEXED_JOB and not packages
    assert ("pip install kubernetes" in caplog.text) == is_missed


def test_kubernetes_pod_trains_alone_without_a_warning(monkeypatch, recwarn, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # libtpu may be installed
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with cluster.joined(None, None, None, 3):
        assert not processes.is_shared()
    assert not recwarn.list
    assert caplog.text == ""


def test_jax_without_its_private_client_costs_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("charlstm"), "propagate", True)
    monkeypatch.setitem(sys.modules, "jax._src", None)  # an import raises ImportError
    watch = cluster.Watch()
    watch.start()
    assert "dead process" in caplog.text
    watch.shutdown(0.0)


@pytest.fixture(scope="module")
def launch():
    """Return a WarmLauncher of launch/train.py."""
    with closing(WarmLauncher(*TRAINING)) as launch:
        yield launch


def write_trained(path, text):
    """Write an exported model with the settings of FLAGS, small weights and the vocabulary."""
    config, vocab = get_config(), Vocab.from_text(text)
    config.model.update({"recurrent_rms_norm": False, "multiplicative": False})
    params = random_params(model_from_config(config, vocab), scale=0.1)
    safetensors.export(as_trained(config, vocab, params), epath.Path(path))


@pytest.fixture(scope="module")
def reference(launch, tmp_path_factory, book):
    """Return the folder of a run of one process; its text lies beside it."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "book.txt").write_text(book, encoding="utf-8")
    write_trained(folder / "trained.safetensors", book.lower().replace("y", "z"))
    answer = launch("train", *FLAGS, "--workdir=reference", cwd=folder)
    assert answer.returncode == 0, answer.stderr
    return folder / "reference"


# A checkpoint after each step leaves time to act before the end.
SLOWLY = ["--config.checkpoint_every_steps=1"]
CHEAPLY = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
# Half the program, where it does not matter what is trained.
ANY_MODEL = ["--config.model.recurrence=flax", "--config.model.dropout_rate=0"]


def kill_one(launch, reference, victim, wanted_step):
    """Train by two processes from wherever the run `deaths` is, and kill one while both train.

    Return (processes, time): the other one is still running.
    """
    workdir = reference.parent / "deaths"
    saved = latest_step(workdir)
    flags = [*FLAGS, *SLOWLY, *ANY_MODEL, "--workdir=deaths"]
    run = Processes(launch, reference.parent, flags, variables=CHEAPLY)
    run.wait_for_step(workdir, wanted_step)
    run.wait_for_line(0, f"steps: {saved} of 20 done")
    run.processes[victim].kill()
    return run, time.time()


def check_other_ends(run, victim, killed_at):
    """Check that the other process ends, with one line within a minute."""
    assert run.wait()[1 - victim] == 1
    assert run.errors[1 - victim].stat().st_mtime - killed_at < 60  # its last line
    last = run.said(1 - victim).splitlines()[-1]
    assert last.startswith(f"error: process {victim} of 2 "), run.said(1 - victim)
    assert "Traceback" not in run.said(1 - victim)


@pytest.fixture(scope="module")
def orphan(launch, reference):
    """Yield (processes, time) of a run whose process 1 has just been killed."""
    run, killed_at = kill_one(launch, reference, 1, 2)
    yield run, killed_at
    for process in run.processes:
        process.kill()


@pytest.mark.usefixtures("orphan")  # its process 0 waits for heartbeats during this test
def test_two_processes_then_one_train_as_one_device(launch, reference):
    folder, workdir = reference.parent, reference.parent / "two"
    run = Processes(launch, folder, [*FLAGS, *SLOWLY, "--workdir=two"], num_devices=4)
    run.wait_for_step(workdir, 6)
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.wait() == [128 + signal.SIGTERM] * 2, run.said(0) + run.said(1)
    assert_stopped(workdir, run.said(0))
    # Both write their shards, and process 0 everything else.
    parts = {path.name for path in workdir.glob("checkpoints/5/state/ocdbt.process_*")}
    assert parts == {"ocdbt.process_0", "ocdbt.process_1"}
    assert "validation" in run.said(0)
    assert "8 x cpu" in run.said(0)
    assert len(run.said(1).splitlines()) == 1  # that it stops

    answer = launch("train", *FLAGS, "--workdir=two", cwd=folder)
    assert answer.returncode == 0, answer.stderr
    assert_runs_close(workdir, reference)
    assert load_run(epath.Path(workdir)).initial_weights
    names = [{p.name for p in where.iterdir()} for where in (workdir, reference)]
    ours, theirs = ({name for name in found if "tfevents" not in name} for found in names)
    assert ours == theirs
    assert list(workdir.glob("*tfevents*"))


def test_death_of_process_1_ends_process_0(orphan):
    run, killed_at = orphan
    check_other_ends(run, 1, killed_at)


@pytest.mark.slow
def test_death_of_process_0_ends_process_1(launch, reference, orphan):
    orphan[0].wait()
    # It dies before the first step of the resumed run.
    run, killed_at = kill_one(launch, reference, 0, 0)
    check_other_ends(run, 0, killed_at)


@pytest.mark.parametrize("place", [by_slurm, by_open_mpi])
def test_processes_of_slurm_and_open_mpi_connect(place, launch, reference):
    # That their seeds differ shows that they are connected.
    flags = {"flags_of_last": ["--config.seed=1"], "place": place}
    run = Processes(launch, reference.parent, [*FLAGS, "--workdir=found"], **flags)
    assert run.wait() == [2, 2], run.said(0)
    for index in (0, 1):
        [line] = run.said(index).splitlines()
        assert "config.seed: " in line
    assert not (reference.parent / "found").exists()


def test_process_trains_alone_with_num_processes_1(launch, reference):
    def alone(port, size, index):
        return ["--num_processes=1"], by_slurm(port, size + 1, index)[1]

    # It reads the text only if it does not wait for the other process.
    flags = [*FLAGS, "--join_timeout=3", "--config.data.path=none.txt"]
    run = Processes(launch, reference.parent, flags, size=1, place=alone)
    assert run.wait() == [2]
    assert "none.txt" in run.said(0)


MISTAKES = [
    (["--config.data.path=other.txt"], "the text: ", True),
    (["--config.data.path=none.txt"], "process 1 of 2 ", False),
]


@pytest.mark.parametrize(("flags", "fact", "on_both"), MISTAKES)
def test_processes_with_different_settings_are_refused(flags, fact, on_both, launch, reference):
    folder = reference.parent
    (folder / "other.txt").write_text((folder / "book.txt").read_text() + "More.\n")
    run = Processes(launch, folder, [*FLAGS, "--workdir=refused"], flags_of_last=flags)
    assert run.wait() == [2, 2]
    for index in (0, 1):
        assert len(run.said(index).splitlines()) == 1, run.said(index)
        assert (fact in run.said(index)) == (on_both or index == 0)
    assert not (folder / "refused").exists()


def test_missing_process_is_reported_after_join_timeout(launch, reference):
    run = Processes(launch, reference.parent, [*FLAGS, "--workdir=few", "--join_timeout=3"], size=3)
    run.processes[1].kill()
    codes = run.wait()
    assert codes[0] == codes[2] == 1
    for index in (0, 2):
        said_at_once = run.errors[index].read_text().splitlines()[0]
        assert f"process {index} waits for 3 " in said_at_once
        [line] = run.said(index).splitlines()
        assert f"process {index} waited 3 s" in line
        assert "--coordinator=127.0.0.1:" in line
    assert not (reference.parent / "few").exists()


def test_second_run_in_the_same_folder_is_refused_on_all(launch, reference):
    from charlstm.files import lock_folder

    with lock_folder(epath.Path(reference)):
        run = Processes(launch, reference.parent, [*FLAGS, "--workdir=reference"])
        assert run.wait() == [2, 2]
    assert "in use by process" in run.said(0)
    assert "process 0 of 2 " in run.said(1)
