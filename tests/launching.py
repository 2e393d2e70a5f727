"""Start launchers: in a new process, or in a fork of one that has imported their modules."""

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Signs of a bug in any output.
NOISE = ("Traceback", "Exception ignored", "Exception in thread", "terminate called", "Warning")
# Flags of a short run. With adamw its probabilities are nearly calibrated after 60 steps.
TINY = ["--config=tiny", "--config.num_steps=60", "--config.eval_every_steps=30"]
TINY += ["--config.optimizer.name=adamw"]


# Modules for a WarmLauncher of processes that end before they import JAX.
WITHOUT_JAX = "charlstm.cli.options", "charlstm.cli.folders", "charlstm.cli.runtime"
# Modules for a WarmLauncher of launch/train.py. A run imports the last two for its curves.
TRAINING = "charlstm.training.loop", "charlstm.system.console", "matplotlib.figure", "scipy.linalg"


def command_of(launcher, *flags):
    return [sys.executable, str(ROOT / "launch" / f"{launcher}.py"), *map(str, flags)]


def run_command(launcher, *flags, cwd=None, **options):
    """Run a launcher; check that it prints no traceback; return the finished process."""
    command = command_of(launcher, *flags)
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, **options
    )
    for noise in NOISE:
        assert noise not in result.stderr, result.stderr
    return result


def train_on(text, folder, *flags):
    """Train on a text, written to book.txt in `folder`; return the finished process."""
    (folder / "book.txt").write_text(text, encoding="utf-8")
    result = run_command("train", *flags, "--config.data.path=book.txt", cwd=folder)
    assert result.returncode == 0, result.stderr
    return result


class Answer(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class WarmLauncher:
    """Starts launchers from a process that has imported `modules`, in a tenth of the time."""

    def __init__(self, *modules, **options):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, __file__, *modules]
        self.process = subprocess.Popen(command, **pipes, **options)

    def __call__(self, launcher, *flags, cwd) -> Answer:
        """Run a launcher and return its answer."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            started = self.start(launcher, *flags, cwd=cwd, out=out, err=err)
            return Answer(started.wait(), out.read_text(), err.read_text())

    def start(self, launcher, *flags, cwd, out, err=None, env=None):
        """Start a launcher that writes to the files `out` and `err`, by default the same file.

        It leads a process group of its own. `env` is added to its environment.
        """
        _, script, *words = command_of(launcher, *flags)
        self._send("start", [str(cwd), str(out), str(err or out), env or {}, script, *words])
        return Started(self, self._receive())

    def _send(self, *request):
        print(json.dumps(request), file=self.process.stdin, flush=True)

    def _receive(self):
        return json.loads(self.process.stdout.readline())

    def exit_code(self, pid, options=0):
        """Return the exit code of a process, None if it has not ended, which needs os.WNOHANG."""
        self._send("wait", [pid, options])
        return self._receive()

    def close(self):
        self.process.stdin.close()
        assert self.process.wait() == 0
        self.process.stdout.close()


class Started:
    """A process that a WarmLauncher has started, with methods of subprocess.Popen."""

    def __init__(self, launcher, pid):
        self.launcher, self.pid, self.returncode = launcher, pid, None

    def poll(self):
        if self.returncode is None:
            self.returncode = self.launcher.exit_code(self.pid, os.WNOHANG)
        return self.returncode

    def wait(self, timeout=120):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("launcher", timeout)
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def serve():
    """Start processes and return their exit codes, as a WarmLauncher requests on stdin."""
    for module in sys.argv[1:]:
        import_module(module)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page with objects
    for line in sys.stdin:
        request, values = json.loads(line)
        if request == "start":
            answer = os.fork()  # before its first array JAX has no threads
            if answer == 0:
                run_script(*values)
        else:
            pid, status = os.waitpid(*values)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


def run_script(cwd, out, err, env, script, *words):
    """Run a launcher as the main program of this process, and exit."""
    code = 1
    signal.alarm(300)  # if the tests end before it
    os.setsid()
    try:
        os.chdir(cwd)
        os.environ.update(env)
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        for number, (path, mode) in enumerate(
            [(os.devnull, os.O_RDONLY), (out, append), (err, append)]
        ):
            descriptor = os.open(path, mode)
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.argv = [script, *words]
        sys.path[0] = str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
