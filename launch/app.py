"""What the launchers share: flags in, mistakes as one line out."""

import early
import signals

# isort: split
import difflib
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import notebook
import runtime
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from charlstm.config import base_config, check_key, flatten, validate
from charlstm.errors import RunError, UserError, one_line
from charlstm.paths import given_path, local_path

StopSignal = signals.StopSignal

REPOSITORY = Path(early.REPOSITORY)
DEFAULT_CONFIG = REPOSITORY / "configs" / "default.py"
GIVEN_FLAGS = tuple(sys.argv[1:])  # before they are put into their normal form
DEBUG = flags.DEFINE_boolean("debug", False, "show where in the code a mistake was noticed")
MAX_MINUTES = 365 * 24 * 60
_CONFIG_FLAG = re.compile(r"--?(no)?config(?:\.([^=]*))?(?:=(.*))?", re.DOTALL)


class PathParser(flags.ArgumentParser):
    """Parses the value of a flag that is a path, by one of the functions of charlstm.paths."""

    syntactic_help = "a path"

    def __init__(self, check: Callable[[str], str]):
        self._check = check

    def parse(self, argument: str) -> str:
        """Return the path; raise UserError if it cannot be used."""
        return self._check(argument)


LOCAL_PATH, ANY_PATH = PathParser(local_path), PathParser(given_path)


def define_config(default: Path = DEFAULT_CONFIG) -> flags.FlagHolder:
    """Define --config and --config.KEY=VALUE, once the command line's are known to be sound."""
    try:
        words = flags.FLAGS.read_flags_from_files(sys.argv[1:], force_gnu=False)
        sys.argv = _normalise([*sys.argv[:1], *words])
    except (flags.Error, UserError) as error:
        sys.exit(_fail(error))
    return config_flags.DEFINE_config_file(
        "config",
        default=str(default),
        help_string="a file of configs/ or its name; --config.KEY=VALUE changes one setting",
        lock_config=True,
    )


def config_name(holder: flags.FlagHolder) -> str:
    """Return the name of the config file without folder and ending."""
    return Path(config_flags.get_config_filename(flags.FLAGS[holder.name])).stem


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
            from charlstm.console import show_logs

            show_logs()
            runtime.prepare()
            return main()
        except UserError as error:
            return _fail(error)
        except KeyboardInterrupt:  # only in a notebook: elsewhere signals.py is faster
            return 128 + signal.SIGINT
        except Exception as error:
            if problem := runtime.problem_of_jax(error):
                return _fail(UserError(problem))
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


def checked_config(holder: flags.FlagHolder) -> ConfigDict:
    """Return the config of --config, validated."""
    try:
        config = holder.value
    except Exception as error:
        path = config_flags.get_config_filename(flags.FLAGS[holder.name])
        raise _config_error(path, error) from error
    validate(config)
    return config


def check_minutes(minutes: float | None) -> None:
    """Raise UserError if --minutes is given and no time from 0 to a year."""
    if minutes is not None and not 0 < minutes <= MAX_MINUTES:
        raise UserError(f"--minutes={minutes}: must be a number above 0, at most {MAX_MINUTES:,}")


def parse_setting(key: str, word: str) -> Any:
    """Return the value that `word` of a command line gives the setting `key`.

    Raises:
      UserError: if there is no such setting, or the value is not of its type.
    """
    check_key(key)
    wanted = type(flatten(base_config())[key])
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    try:
        if wanted is bool:
            return {"true": True, "1": True, "false": False, "0": False}[word.lower()]
        return wanted(word)
    except (KeyError, ValueError):
        raise UserError(f"config.{key}={word}: must be {names[wanted]}") from None


def train_command(holder: flags.FlagHolder, settings: dict[str, Any]) -> str:
    """Return a command of train.py for `settings` and the config flags given here.

    It trains in a folder that does not exist.
    """
    import folders

    from charlstm.console import launcher_command

    words = []
    for word in sys.argv[1:]:
        name, _, value = word.partition("=")
        if name == "--config":
            is_ours = Path(value).parent == DEFAULT_CONFIG.parent
            words.append(f"--config={Path(value).stem if is_ours else value}")
        elif name.startswith("--config.") and name.removeprefix("--config.") not in settings:
            words.append(word)
    words += [f"--config.{key}={value}" for key, value in settings.items()]
    path = settings.get("data.path", holder.value.data.path)
    workdir = folders.free_workdir(folders.default_workdir(config_name(holder), path))
    return launcher_command("train", *words, f"--workdir={workdir}")


def _config_error(path: str, error: Exception) -> UserError:
    return UserError(
        f"--config={path}: raised {type(error).__name__}: {error}; it must define get_config()"
    )


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
        if early.stdout_failure() is None:
            raise  # it was another file
    error = early.stdout_failure()
    # A reader that closes its pipe, such as head, has enough.
    if not code and error is not None and not isinstance(error, BrokenPipeError):
        code = _fail(RunError(f"stdout: cannot be written ({error.strerror}); make room there"))
    early.discard_unwritten()
    return code


def _help(example: str) -> int:
    import usage

    print(usage.help_text(example))
    return 0


def _fail(error: Exception) -> int:
    if f"--{DEBUG.name}" in sys.argv:  # flags may be what the mistake is in
        traceback.print_exception(error)
    early.show_error(one_line(error))
    return getattr(error, "exit_code", 2)


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (flags.Error, UserError) as error:
        sys.exit(_fail(error))
    except SystemExit:
        sys.exit(0)  # after --helpfull, which absl counts as a failure
    except Exception as error:  # a config file is a program
        given = [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
        sys.exit(_fail(_config_error([str(DEFAULT_CONFIG), *given][-1], error)))


def _normalise(argv: list[str]) -> list[str]:
    """Return `argv` with every config flag checked, in the form --config.KEY=VALUE.

    config_flags answers a mistyped key or a missing file with pages of traceback, or late.
    """
    files: list[str] = []  # the last comes first, since settings change what it gives
    normal: list[str] = []
    words = iter(argv)
    for word in words:
        match = _CONFIG_FLAG.fullmatch(word)
        if match is None:
            normal.append(word)
            continue
        negated, key, value = match.groups()
        if key is None:
            value = next(words, "") if value is None else value
            files.append(f"--config={_config_path(value)}")
            continue
        check_key(key)
        if value is None and isinstance(flatten(base_config())[key], bool):
            value = "false" if negated else "true"
        elif value is None:
            value = next(words, "")
        parse_setting(key, value)
        if key == "data.path":
            value = given_path(value)
        normal.append(f"--config.{key}={value}")
    return [*normal[:1], *files[-1:], *normal[1:]]


def _config_path(name: str) -> Path:
    """Return the file that `name` means: a path, or a name in configs/."""
    in_repository = REPOSITORY / name
    by_name = REPOSITORY / "configs" / f"{name}.py"
    for path in (Path(os.path.expanduser(name)), in_repository, by_name):
        if name and path.is_file():
            return path.resolve()
    known = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py"))
    near = difflib.get_close_matches(Path(name).stem, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--config={name}: no such file; {hint}configs/ has {', '.join(known)}")
