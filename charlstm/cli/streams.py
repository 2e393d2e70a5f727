"""What a launcher does before any import that takes long: see to its streams and its end.

It imports only what Python itself has loaded already.
"""

import io
import os
import sys

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
LAUNCH = os.path.join(REPOSITORY, "launch")


def open_descriptors() -> None:
    """Open the descriptors 0, 1, 2 that are closed, so that no other file gets them."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    # Python has no stream for a descriptor that was closed.
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


class Descriptor(io.FileIO):
    """A raw stream that remembers why it could not be written."""

    failure: OSError | None = None

    def write(self, data):  # type: ignore[no-untyped-def]
        """Write some bytes."""
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


def replace_stdout() -> None:
    """Write stdout in UTF-8 in any locale, line by line; leave a notebook's unchanged."""
    if hasattr(sys.stdout, "reconfigure"):
        stream = io.BufferedWriter(Descriptor(1, "w", closefd=False))
        sys.stdout = io.TextIOWrapper(
            stream, encoding="utf-8", errors="backslashreplace", line_buffering=True
        )


def stdout_failure() -> OSError | None:
    """Return why stdout could not be written, None if it could."""
    try:
        sys.stdout.flush()
    except OSError:
        pass
    return getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "failure", None)


def discard_unwritten() -> None:
    """Drop what stdout and stderr could not write; Python would try again, and fail, at its end."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def show_line(line: str) -> None:
    """Print a line on stderr if it can be written."""
    try:
        print(line, file=sys.stderr)
    except OSError:
        pass


def show_error(message: str) -> None:
    """Print an error on stderr after the launcher's name."""
    show_line(f"{os.path.basename(sys.argv[0])}: error: {message}")


def is_launcher() -> bool:
    """Return whether the program of this process is a launcher."""
    program = getattr(sys.modules["__main__"], "__file__", None)
    return program is not None and os.path.dirname(os.path.realpath(program)) == LAUNCH


def is_notebook() -> bool:
    """Return whether the process is IPython's, whose signals are not ours."""
    return "IPython" in sys.modules


def show_uncaught(kind, error, trace) -> None:  # type: ignore[no-untyped-def]
    """Show an exception that nothing has caught: a missing package is one line, Ctrl-C none."""
    if issubclass(kind, KeyboardInterrupt):
        os._exit(130)
    if not issubclass(kind, ModuleNotFoundError) or "--debug" in sys.argv:
        sys.__excepthook__(kind, error, trace)
        return
    remedy = f"install it with: {sys.executable} -m pip install -e {REPOSITORY}"
    environment = os.path.join(REPOSITORY, ".venv", "bin", "python")
    if os.path.exists(environment) and environment != sys.executable:
        remedy = f"start the launcher with {environment}, or {remedy}"
    show_error(f"{sys.executable} has no module {error.name}; {remedy}")


if is_launcher():
    sys.excepthook = show_uncaught
    open_descriptors()
    replace_stdout()
