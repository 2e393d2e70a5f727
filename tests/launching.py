"""How tests start the launchers: as a user does, or sixty at a time."""

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# What would tell of a fault of ours, whatever the exit code.
NOISE = ("Traceback", "Exception ignored", "Exception in thread", "terminate called", "Warning")


def command_of(launcher, *flags):
    return [sys.executable, str(ROOT / "launch" / f"{launcher}.py"), *map(str, flags)]


def run_command(launcher, *flags, cwd=None, **options):
    """Run a launcher to its end; whatever happens, it must not show a traceback."""
    command = command_of(launcher, *flags)
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, **options
    )
    for noise in NOISE:
        assert noise not in result.stderr, result.stderr
    return result


def train_on(text, folder, *flags):
    """Train on a text, as book.txt in `folder`, to the end; return what the launcher answered."""
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
        _, script, *words = command_of(launcher, *flags)
        print(json.dumps([str(cwd), script, *words]), file=self.process.stdin, flush=True)
        return Answer(*json.loads(self.process.stdout.readline()))

    def close(self):
        self.process.stdin.close()
        assert self.process.wait() == 0
        self.process.stdout.close()


def serve():
    """Answer each line [cwd, script, flag, ...] of stdin with one of [code, stdout, stderr]."""
    for module in sys.argv[1:]:
        import_module(module)
    for line in sys.stdin:
        cwd, script, *words = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()  # before its first array JAX has no threads
            if child == 0:
                code = 1
                signal.alarm(120)  # as long as run_command waits
                try:
                    os.chdir(cwd)
                    for file, number in ((open(os.devnull), 0), (out, 1), (err, 2)):
                        os.dup2(file.fileno(), number)
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
            _, status = os.waitpid(child, 0)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())
        print(json.dumps([os.waitstatus_to_exitcode(status), *texts]), flush=True)


if __name__ == "__main__":
    serve()
