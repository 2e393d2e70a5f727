"""Set up the standard streams and the exception hook of a launcher, before slow imports.

This module imports only what Python has already loaded.
"""

import io
import os
import sys

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
LAUNCH = os.path.join(REPOSITORY, "launch")


def open_descriptors() -> None:
    """Open those of the descriptors 0, 1 and 2 that are closed, so that no other file gets them."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    # For a closed descriptor Python sets the stream to None.
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


class Descriptor(io.FileIO):
    """A raw stream that stores the last error of a write."""

    failure: OSError | None = None

    def write(self, data):  # type: ignore[no-untyped-def]
        """Write some bytes."""
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


def replace_stdout() -> None:
    """Make stdout UTF-8 and line-buffered in any locale, except in a notebook."""
    if hasattr(sys.stdout, "reconfigure"):
        stream = io.BufferedWriter(Descriptor(1, "w", closefd=False))
        sys.stdout = io.TextIOWrapper(
            stream, encoding="utf-8", errors="backslashreplace", line_buffering=True
        )


def stdout_failure() -> OSError | None:
    """Flush stdout and return the error of a write, or None."""
    try:
        sys.stdout.flush()
    except OSError:
        pass
    return getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "failure", None)


def discard_unwritten() -> None:
    """Discard what stdout and stderr cannot write; otherwise Python fails on it at exit."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def show_line(line: str) -> None:
    """Print a line to stderr; ignore failure."""
    try:
        print(line, file=sys.stderr)
    except OSError:
        pass


def show_error(message: str) -> None:
    """Print an error to stderr, with the name of the launcher."""
    show_line(f"{os.path.basename(sys.argv[0])}: error: {message}")


def is_launcher() -> bool:
    """Return whether this process runs a launcher."""
    program = getattr(sys.modules["__main__"], "__file__", None)
    return program is not None and os.path.dirname(os.path.realpath(program)) == LAUNCH


def is_notebook() -> bool:
    """Return whether this is a process of IPython, which handles signals itself."""
    return "IPython" in sys.modules


def show_uncaught(kind, error, trace) -> None:  # type: ignore[no-untyped-def]
    """Print an uncaught exception: one line for a missing package, nothing for Ctrl-C."""
    if issubclass(kind, KeyboardInterrupt):
        os._exit(130)
    if not issubclass(kind, ModuleNotFoundError) or "--debug" in sys.argv:
        sys.__excepthook__(kind, error, trace)
        return
    remedy = f"install it with: {sys.executable} -m pip install -e {REPOSITORY}"
    environment = os.path.join(REPOSITORY, ".venv", "bin", "python")
    if os.path.exists(environment) and environment != sys.executable:
        remedy = f"run the launcher with {environment}, or {remedy}"
    show_error(f"{sys.executable} has no module {error.name}; {remedy}")


if is_launcher():
    sys.excepthook = show_uncaught
    open_descriptors()
    replace_stdout()
