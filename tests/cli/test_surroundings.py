"""Launchers with signals, closed descriptors, environment variables, other interpreters."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from helpers import small_config, untrained_run
from launching import command_of

# Run a launcher, and send it SIGINT at the import of a module or at the next compilation.
INTERRUPTED = """
import os, runpy, signal, sys, threading
moment, script, *words = sys.argv[1:]
module, _, is_later = moment.partition("+")

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

def interrupt_compilation(event, **about):
    if "compile_requests" in event:
        threading.Timer(0.02, interrupt).start()

def hook(event, args):
    if event == "import" and args[0] == module:
        if not is_later:
            interrupt()
        else:
            from jax import monitoring
            monitoring.register_event_listener(interrupt_compilation)

sys.addaudithook(hook)
sys.argv = [script, *words]
sys.path[0] = os.path.dirname(script)
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, book):
    folder = tmp_path_factory.mktemp("signals")
    (folder / "book.txt").write_text(book, encoding="utf-8")
    untrained_run(small_config(folder / "book.txt"), folder / "run")
    return folder


@pytest.mark.parametrize(
    ("moment", "launcher", "flags"),
    [
        ("absl", "sweep", ()),
        ("numpy.random.bit_generator", "train", ("--config.data.path=book.txt",)),
        ("jaxlib._jax", "sample", ()),
        ("charlstm.evaluation.dynamic+compilation", "evaluate", ("--workdir=run", "--dynamic")),
        (
            "charlstm.training.validation+compilation",
            "plan",
            ("--config=tiny", "--config.data.path=book.txt"),
        ),
    ],
)
def test_sigint_exits_with_its_code_and_no_traceback(moment, launcher, flags, trained, tmp_path):
    folders = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "empty"), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", INTERRUPTED, moment, *command_of(launcher, *flags)[1:]]
    answer = subprocess.run(
        command, cwd=trained, env=os.environ | folders, capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 128 + signal.SIGINT, answer.stderr
    assert "Traceback" not in answer.stderr
    assert "Fatal" not in answer.stderr
    assert answer.stdout == ""
    assert [path for path in tmp_path.iterdir() if path.name != "empty"] == []


def in_shell(line, cwd, **variables):
    """Run a line of sh, with $PYTHON and $LAUNCH set; return exit code, stdout, lines of stderr."""
    ours = {"PYTHON": sys.executable, "LAUNCH": str(ROOT / "launch")}
    answer = subprocess.run(
        ["sh", "-c", line],
        cwd=cwd,
        env=os.environ | ours | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in answer.stderr
    assert "Exception ignored" not in answer.stderr
    return answer.returncode, answer.stdout, answer.stderr.splitlines()


@pytest.mark.parametrize(
    "start",
    [
        "$PYTHON -P $LAUNCH/sample.py",
        "$PYTHON -I $LAUNCH/sample.py",
        "PYTHONSAFEPATH=1 $PYTHON $LAUNCH/sample.py",
        "cd $LAUNCH/..; $PYTHON -m launch.sample",
    ],
)
def test_launcher_finds_its_modules_with_any_start(start, tmp_path):
    code, _, [line] = in_shell(f"{start} --length=ten", tmp_path)
    assert code == 2
    assert "--length=ten" in line


def test_missing_package_is_one_line(tmp_path):
    code, _, [line] = in_shell("$PYTHON -S $LAUNCH/train.py", tmp_path)
    assert code == 1
    assert "no module absl" in line
    assert f"{sys.executable} -m pip install -e {ROOT}" in line


def test_launcher_works_with_closed_descriptors(tmp_path):
    # It reports the missing text with exit code 2, so the closed descriptors are no failure.
    flags = "--config=tiny --config.data.path=none.txt"
    assert in_shell(f"$PYTHON $LAUNCH/train.py {flags} <&- >&- 2>&-", tmp_path)[0] == 2


def test_full_disk_behind_stdout_is_one_line(trained):
    # More than a buffer holds.
    flags = "--workdir=run --prompt=so --length=10000"
    code, _, [line] = in_shell(f"$PYTHON $LAUNCH/sample.py {flags} > /dev/full", trained)
    assert code == 1
    assert "stdout: " in line
    assert "No space left on device" in line


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("JAX_PLATFORMS", "cuda", "device"),
        ("JAX_ENABLE_X64", "maybe", "truth value"),
    ],
)
def test_invalid_environment_variable_of_jax_is_one_line(name, value, reason, tmp_path):
    flags = "--config=tiny --config.data.path=none.txt"
    code, out, [line] = in_shell(f"$PYTHON $LAUNCH/train.py {flags}", tmp_path, **{name: value})
    assert (code, out) == (2, "")
    assert f"error: {name}={value}: " in line
    assert reason in line
    assert list(tmp_path.iterdir()) == []


def test_launchers_ignore_pythonwarnings(tmp_path):
    flags = "--config=tiny --config.batch_size=0"
    answer = in_shell(f"$PYTHON $LAUNCH/train.py {flags}", tmp_path, PYTHONWARNINGS="error")
    assert answer[0] == 2
    [line] = answer[2]
    assert "config.batch_size=0: " in line


def test_full_disk_behind_stderr_keeps_the_exit_code(tmp_path):
    assert in_shell("$PYTHON $LAUNCH/sample.py --length=ten 2> /dev/full", tmp_path)[0] == 2


def stopped_by(*numbers):
    """Return exit code and output of a process with StopSignal that gets signals one by one.

    If the first of `numbers` is negative, the process ignores SIGHUP.
    """
    numbers = tuple(map(int, numbers))
    program = (
        "import signal, time\n"
        f"if {numbers[0] < 0}: signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from charlstm.cli import signals; signals.watch.start()\n"
        "with signals.StopSignal() as stop:\n"
        f"    for number in {numbers}:\n"
        "        signal.raise_signal(abs(number))\n"
        "        time.sleep(0.2)\n"
        "        print(stop.number, flush=True)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    return answer.returncode, [int(word) for word in answer.stdout.split()]


def test_second_signal_exits_at_once():
    assert stopped_by(signal.SIGHUP, signal.SIGTERM) == (128 + signal.SIGTERM, [signal.SIGHUP])


def test_sighup_ignored_by_nohup_stays_ignored():
    assert stopped_by(-signal.SIGHUP, signal.SIGINT) == (0, [0, signal.SIGINT])


# Run launchers as %run does in a notebook, where stdout is not a file.
NOTEBOOK = """
import io, os, runpy, signal, sys, types
sys.modules["IPython"] = types.ModuleType("IPython")
for line in sys.stdin.read().splitlines():
    script, *flags = line.split()
    sys.argv = [script, *flags]
    sys.stdout = cell = io.StringIO()
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print(end.code, len(cell.getvalue()) > 0, sys.stdout is cell, file=sys.__stdout__)
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, file=sys.__stdout__)
"""


def test_launchers_run_repeatedly_in_a_notebook(tmp_path):
    commands = [
        "sample --length=ten",
        "sample --help",
        "train --config=tiny --help",
        "train --config.batch_size=0",
        "plan --minutes=0",
        "train --config=tiny --config.data.path=none.txt",
        "sample --workdir=nowhere",
    ]
    lines = [f"{ROOT}/launch/{command.replace(' ', '.py ', 1)}" for command in commands]
    answer = subprocess.run(
        [sys.executable, "-c", NOTEBOOK],
        input="\n".join(lines),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    *outcomes, has_handler = answer.stdout.splitlines()
    prints = {"0": "0 True True", "2": "2 False True"}
    assert outcomes == [prints[code] for code in "2002222"], answer.stderr
    assert has_handler == "True"
    assert len(answer.stderr.splitlines()) == 5, answer.stderr
