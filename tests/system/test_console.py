import fcntl
import io
import logging
import os
import re
import struct
import subprocess
import sys
import termios

import pytest
from conftest import ROOT
from etils import epath
from helpers import QUICK, small_config

import charlstm.system.console
from charlstm.errors import one_line
from charlstm.runs.checkpoints import steps_in
from charlstm.system.console import (
    ConsoleHandler,
    TrainingBar,
    best_effort,
    launcher_command,
    reading_bar,
    show_logs,
    status,
)
from charlstm.training.loop import train

RECORD = {
    "step": 20,
    "chars_per_second": 6680.0,
    "train/loss": 3.25,
    "train/bits_per_char": 4.69,
}


@pytest.fixture
def package():
    """Return the package's logger; restore its settings afterwards."""
    logger = logging.getLogger("charlstm")
    before = logger.handlers, logger.propagate, logger.level
    yield logger
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


@pytest.fixture
def terminal(monkeypatch, package):
    """Return open_terminal(columns, *names of streams), and a function that reads the terminal."""
    ours, theirs = os.openpty()
    monkeypatch.setenv("TERM", "xterm")

    def open_terminal(columns, *names):
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        for name in names:
            monkeypatch.setattr(sys, name, open(theirs, "w", closefd=False))
        monkeypatch.setattr(charlstm.system.console, "REDRAW_SECONDS", -1.0)

    def read():
        os.write(theirs, b"\0")
        written = b""
        while not written.endswith(b"\0"):
            written += os.read(ours, 10**6)
        return written[:-1].decode()

    yield open_terminal, read
    os.close(ours)
    os.close(theirs)


def screen(written):
    """Return the lines that a terminal shows in the end, and all texts of its last line.

    It interprets carriage return, line feed and the erasing of a line, and ignores colors.
    """
    lines, drawn = [""], []
    plain = re.sub(r"\x1b\[[\d;]*m", "", written)
    for piece in re.split(r"(\r\n|\r\x1b\[2K)", plain):
        if piece == "\r\n":
            lines.append("")
        elif piece == "\r\x1b[2K":
            lines[-1] = ""
        else:
            assert "\x1b" not in piece
            assert "\r" not in piece
            lines[-1] += piece
            drawn.append(piece)
    return lines, drawn


def test_console_escapes_control_characters(capsys):
    text = "a sample:\n\x1b[2J\x1b]0;owned\x07\u009b31m[bold]:smile:\ttab"
    record = logging.LogRecord("charlstm", logging.WARNING, "", 0, text, None, None)
    ConsoleHandler().emit(record)
    shown = capsys.readouterr().err
    expected = r"warning: a sample:\n\x1b[2J\x1b]0;owned\x07\x9b31m[bold]:smile:"
    assert shown == expected.replace(r"\n", "\n", 1) + "\ttab\n"


@pytest.mark.parametrize("on_stdout", [False, True])
def test_progress_goes_to_the_chosen_stream(on_stdout, capsys, package):
    show_logs(progress_on_stdout=on_stdout)
    logging.getLogger("charlstm.training.loop").info("step 1")
    logging.getLogger("charlstm.training.loop").warning("careful")
    out, err = capsys.readouterr()
    assert out == ("step 1\n" if on_stdout else "")
    assert err == ("" if on_stdout else "step 1\n") + "warning: careful\n"


def test_training_goes_on_if_nothing_can_be_printed(monkeypatch, package, book_path, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    # A pipe that nobody reads, and a full disk.
    with open(writer, "w", closefd=False) as stdout, open("/dev/full", "w") as stderr:
        for stream in (stdout, stderr):
            with pytest.raises(OSError, match=r"pipe|space"):
                os.write(stream.fileno(), b"this raises")
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        show_logs(progress_on_stdout=True)
        logging.getLogger("charlstm.training.loop").warning("lost" * 10_000)
        print("lost", file=sys.stderr)
        assert train(small_config(book_path, num_steps=2, **QUICK), tmp_path / "run")
        sys.stdout.close()
        sys.stderr.close()  # as Python does at its end
    os.close(writer)
    assert steps_in(epath.Path(tmp_path / "run" / "checkpoints")) == [2]


def test_best_effort_keeps_a_stream_without_a_file(capsys):
    class Notebook(io.StringIO):
        def fileno(self):
            return 2

    for stream in (sys.stdout, Notebook()):
        assert best_effort(stream, "stdout") is stream


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_bar_fits_the_terminal_and_shows_steps_and_time_left(columns, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    open_terminal, read = terminal
    open_terminal(columns, "stderr")
    bar = TrainingBar(3808, 0)
    bar.start()
    bar.advance(20)
    bar.show(RECORD)
    bar.advance(20)
    with bar.status("evaluating"):
        pass
    _, drawn = screen(read())
    lines = [line for line in drawn if line]
    assert "compiling" in lines[0]
    assert "evaluating" in lines[-1]
    for line, step in zip(lines, (0, 20, 40, 40), strict=True):
        assert columns - 5 <= len(line) <= columns
        assert f"{step}/3808" in line
        assert re.search(r"\d:\d\d:\d\d|-:--:--", line)
    assert "4.690 bits" in lines[2]
    assert ("loss 3.250, 4.690 bits/char, 6,680 chars/s" in lines[2]) == (columns >= 80)
    bar.stop()
    assert screen(read())[0] == [""]


@pytest.mark.parametrize("columns", [40, 120])
def test_reading_bar_shows_the_share_that_is_read(columns, terminal):
    open_terminal, read = terminal
    open_terminal(columns, "stderr")
    with status("reading the text"), reading_bar("counting characters", 4000) as advance:
        advance(1000)
    lines, drawn = screen(read())
    assert lines == [""]
    first, *bars = [line for line in drawn if line]
    assert first == "reading the text"
    for line, share in zip(bars, ("0%", "25%"), strict=True):
        assert columns - 5 <= len(line) <= columns
        assert re.search(rf"^counting characters .* {share} ", line)


def test_log_lines_and_the_last_line_do_not_mix(terminal):
    open_terminal, read = terminal
    open_terminal(80, "stdout", "stderr")
    show_logs(progress_on_stdout=True)
    logger = logging.getLogger("charlstm.training.loop")
    with status("reading the text"):
        logger.info("a book")
    bar = TrainingBar(40, 0)
    bar.start()
    for step in (20, 40):
        bar.advance(20)
        bar.show(RECORD)
        logger.info("step %d: validation", step)
        logger.warning("careful")
    bar.stop()
    logger.info("the end")
    written = read()
    evaluation = ["step 20: validation", "warning: careful"]
    wanted = ["a book", *evaluation, "step 40: validation", "warning: careful", "the end", ""]
    assert screen(written)[0] == wanted
    assert "\x1b[?25l" not in written  # the cursor stays visible


def test_log_has_a_line_for_each_record_and_no_bar(monkeypatch, capsys, package):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    show_logs()
    bar = TrainingBar(40, 0)
    bar.start()
    bar.advance(20)
    bar.show(RECORD)
    bar.stop()
    assert capsys.readouterr().err == "step 20: loss 3.250, 4.690 bits/char, 6,680 chars/s\n"


def test_bar_stays_on_the_terminal_if_stdout_is_a_file(terminal, capsys):
    open_terminal, read = terminal
    open_terminal(80, "stderr")
    show_logs(progress_on_stdout=True)
    bar = TrainingBar(40, 0)
    bar.start()
    bar.show(RECORD)
    assert capsys.readouterr().out == "step 20: loss 3.250, 4.690 bits/char, 6,680 chars/s\n"
    # A line through a pipe to the same terminal finds an empty last line.
    assert screen(read())[0] == [""]
    bar.stop()


@pytest.mark.parametrize(
    ("interpreter", "program", "wanted"),
    [
        (".venv/bin/python", "launch/train.py", ".venv/bin/python launch/sample.py"),
        ("/usr/bin/python3", "{root}/launch/plan.py", "/usr/bin/python3 {root}/launch/sample.py"),
        ("python", "train.py", "python sample.py"),
        ("pytest", "notebook.py", "python launch/sample.py"),
    ],
)
def test_launcher_command_starts_like_this_process(interpreter, program, wanted, monkeypatch):
    monkeypatch.chdir(ROOT / "launch" if program == "train.py" else ROOT)
    monkeypatch.setattr(sys, "argv", [program.format(root=ROOT), "--x=1"])
    monkeypatch.setattr(sys, "orig_argv", [interpreter, "-X", "dev", *sys.argv])
    command = launcher_command("sample", "--workdir=a b")
    assert command == f"{wanted.format(root=ROOT)} '--workdir=a b'"


@pytest.mark.parametrize("word", ["a b", "it's", "caf\udce9 9", "a\nb\\", "\x1b[31m9", "\u00e9"])
def test_launcher_command_is_printable_and_works_in_a_shell(word):
    command = launcher_command("sample", word)
    assert one_line(command) == command
    program = command.removeprefix("python launch/sample.py")
    shell = ["bash", "-c", f"printf %s {program}"]
    assert subprocess.run(shell, capture_output=True, check=True).stdout == os.fsencode(word)


def test_full_disk_behind_stdout_is_one_warning(monkeypatch, package, capsys):
    with open("/dev/full", "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        show_logs(progress_on_stdout=True)
        package.info("lost")
        package.info("lost too")
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: stdout: ")
    assert "No space left on device" in line
