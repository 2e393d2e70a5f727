"""Run a launcher: parse its flags, print a mistake as one line, return its exit code."""

import os
import sys

# So that a charlstm that is not installed can print how to install it.
sys.path.append(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from charlstm.cli import signals, streams  # first: they set up streams and signals

# isort: split
import signal
import warnings
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

from charlstm.cli import notebook, runtime
from charlstm.cli.options import DEFAULT_CONFIG, config_error, fail
from charlstm.errors import RunError, UserError

StopSignal = signals.StopSignal

GIVEN_FLAGS = tuple(sys.argv[1:])  # before options.normalise
flags.DEFINE_boolean("debug", False, "print the traceback of a mistake")


def run(main: Callable[..., int | None], example: str = "", takes_files: bool = False) -> None:
    """Parse the flags, call `main` and exit with its code, or with 2 and one line for a UserError.

    Args:
      main: takes no argument, or the list of words that are not flags if `takes_files`.
      example: the flags of the example that --help prints.
      takes_files: allow such words before, between and after the flags.
    """

    def guarded(argv: list[str]) -> int | None:
        try:
            if len(argv) > 1 and not takes_files:
                raise UserError(f"{argv[1]}: not a flag; flags begin with --, see --help")
            from charlstm.system.console import show_logs

            show_logs()
            runtime.prepare()
            return main(argv[1:]) if takes_files else main()
        except UserError as error:
            return fail(error)
        except KeyboardInterrupt:  # only in a notebook; elsewhere signals.py exits
            return 128 + signal.SIGINT
        except Exception as error:
            if problem := runtime.problem_of_jax(error):
                return fail(UserError(problem))
            raise

    with notebook.restored():
        flags.FLAGS.set_gnu_getopt(takes_files)
        set_logging()
        if {"-h", "-help", "--help"} & set(sys.argv[1:]):
            sys.exit(_with_stdout(lambda: _help(example)))
        app.run(lambda argv: _with_stdout(lambda: guarded(argv)), flags_parser=_parse)


def set_logging() -> None:
    """Silence the logs of dependencies, and print their warnings as lines."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # JAX and Orbax log details, and pages about a failed save.
    logging.set_verbosity(logging.FATAL)
    calm_warnings()
    sys.unraisablehook = _unraisable


def calm_warnings() -> None:
    """Print warnings as lines, except those for developers, and ignore PYTHONWARNINGS."""
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", message=r"coroutine .* was never awaited")
    warnings.showwarning = runtime.show_warning  # type: ignore[assignment]


def _unraisable(event: Any) -> None:
    # After a failed save, Orbax's other writes report here that their event loop is closed.
    if str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


def _with_stdout(work: Callable[[], int | None]) -> int | None:
    """Return the exit code of `work`, or print one line and return 1 if stdout is not writable."""
    code: int | None = 0
    try:
        code = work()
    except OSError:
        if streams.stdout_failure() is None:
            raise  # the error is of another file
    error = streams.stdout_failure()
    # A reader may close its pipe, as `head` does.
    if not code and error is not None and not isinstance(error, BrokenPipeError):
        code = fail(RunError(f"stdout: cannot be written ({error.strerror}); free space there"))
    streams.discard_unwritten()
    return code


def _help(example: str) -> int:
    from charlstm.cli import usage

    print(usage.help_text(example))
    return 0


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (flags.Error, UserError) as error:
        sys.exit(fail(error))
    except SystemExit:
        sys.exit(0)  # after --helpfull, where absl exits with 1
    except Exception as error:  # a config file is a program
        given = [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
        sys.exit(fail(config_error([str(DEFAULT_CONFIG), *given][-1], error)))
