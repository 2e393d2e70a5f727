"""What the launchers share: flags in, mistakes as one line out."""

import os
import sys

# Without an installed charlstm the message about what to install comes from the package itself.
sys.path.append(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from charlstm.cli import signals, streams  # first, since they handle streams and signals

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

GIVEN_FLAGS = tuple(sys.argv[1:])  # before they are put into their normal form
flags.DEFINE_boolean("debug", False, "show where in the code a mistake was noticed")
MAX_MINUTES = 365 * 24 * 60


def run(main: Callable[[], int | None], example: str = "") -> None:
    """Parse the flags, call `main`, and exit with its code; a user's mistake is one line and 2.

    `example` is the flags of the example that --help shows.
    """

    def guarded(argv: list[str]) -> int | None:
        try:
            if len(argv) > 1:
                raise UserError(
                    f"{argv[1]}: not a flag; flags begin with --, and --help lists them"
                )
            from charlstm.system.console import show_logs

            show_logs()
            runtime.prepare()
            return main()
        except UserError as error:
            return fail(error)
        except KeyboardInterrupt:  # only in a notebook: elsewhere signals.py is faster
            return 128 + signal.SIGINT
        except Exception as error:
            if problem := runtime.problem_of_jax(error):
                return fail(UserError(problem))
            raise

    with notebook.restored():
        set_logging()
        if {"-h", "-help", "--help"} & set(sys.argv[1:]):
            sys.exit(_with_stdout(lambda: _help(example)))
        app.run(lambda argv: _with_stdout(lambda: guarded(argv)), flags_parser=_parse)


def set_logging() -> None:
    """Let dependencies log errors of their own only, and show their warnings as lines."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # JAX and Orbax log much that is not about the run, and pages about a failed save.
    logging.set_verbosity(logging.FATAL)
    calm_warnings()
    sys.unraisablehook = _unraisable


def calm_warnings() -> None:
    """Show warnings as lines, and those for developers not at all, whatever PYTHONWARNINGS says."""
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", message=r"coroutine .* was never awaited")
    warnings.showwarning = runtime.show_warning  # type: ignore[assignment]


def check_minutes(minutes: float | None) -> None:
    """Raise UserError if --minutes is given and no time from 0 to a year."""
    if minutes is not None and not 0 < minutes <= MAX_MINUTES:
        raise UserError(f"--minutes={minutes}: must be a number above 0, at most {MAX_MINUTES:,}")


def _unraisable(event: Any) -> None:
    # After a failed save, each of Orbax's other writes finds its loop closed and reports it here.
    if str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


def _with_stdout(work: Callable[[], int | None]) -> int | None:
    """Return the exit code of `work`, or 1 with a line if stdout cannot take what it prints."""
    code: int | None = 0
    try:
        code = work()
    except OSError:
        if streams.stdout_failure() is None:
            raise  # it was another file
    error = streams.stdout_failure()
    # A reader that closes its pipe, such as head, has enough.
    if not code and error is not None and not isinstance(error, BrokenPipeError):
        code = fail(RunError(f"stdout: cannot be written ({error.strerror}); make room there"))
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
        sys.exit(0)  # after --helpfull, which absl counts as a failure
    except Exception as error:  # a config file is a program
        given = [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
        sys.exit(fail(config_error([str(DEFAULT_CONFIG), *given][-1], error)))
