"""Define and check flags of several launchers: paths, --config=NAME and --config.KEY=VALUE."""

import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from charlstm.cli import folders, streams
from charlstm.config import base_config, flatten
from charlstm.config_check import check_key, check_setting, parse_setting, validate
from charlstm.data.encoding import decode
from charlstm.errors import UserError, one_line
from charlstm.system.console import launcher_command
from charlstm.system.paths import given_path, local_path

REPOSITORY = Path(streams.REPOSITORY)
DEFAULT_CONFIG = REPOSITORY / "configs" / "default.py"
MAX_FILE_BYTES = 2**26  # of a file that a flag names
MAX_MINUTES = 365 * 24 * 60
_CONFIG_FLAG = re.compile(r"--?(no)?config(?:\.([^=]*))?(?:=(.*))?", re.DOTALL)


class PathParser(flags.ArgumentParser):
    """Parser of a flag whose value is a path."""

    syntactic_help = "a path"

    def __init__(self, check: Callable[[str], str]):
        self._check = check

    def parse(self, argument: str) -> str:
        """Return the path; raise UserError if it cannot be used."""
        return self._check(argument)


flags.disclaim_key_flags()  # flags that functions here define belong to the launcher
LOCAL_PATH, ANY_PATH = PathParser(local_path), PathParser(given_path)


def define_config(default: Path = DEFAULT_CONFIG) -> flags.FlagHolder:
    """Define --config and --config.KEY=VALUE, after checking those of the command line."""
    try:
        words = flags.FLAGS.read_flags_from_files(sys.argv[1:], force_gnu=False)
        sys.argv = normalise([*sys.argv[:1], *words])
    except (flags.Error, UserError) as error:
        sys.exit(fail(error))
    return config_flags.DEFINE_config_file(
        "config",
        default=str(default),
        help_string="a file of configs/ or its name; --config.KEY=VALUE changes one setting",
        lock_config=True,
    )


def config_name(holder: flags.FlagHolder) -> str:
    """Return the name of the config file without folder and suffix."""
    return Path(config_flags.get_config_filename(flags.FLAGS[holder.name])).stem


def checked_config(holder: flags.FlagHolder) -> ConfigDict:
    """Return the config of --config, validated."""
    try:
        config = holder.value
    except Exception as error:
        path = config_flags.get_config_filename(flags.FLAGS[holder.name])
        raise config_error(path, error) from error
    validate(config)
    return config


def unset_settings(holder: flags.FlagHolder) -> set[str]:
    """Return the settings that no flag gives and that have their default in the config file."""
    given = config_flags.get_override_values(flags.FLAGS[holder.name])
    defaults = flatten(base_config())
    settings = flatten(holder.value).items()
    return {key for key, value in settings if key not in given and value == defaults[key]}


def train_command(holder: flags.FlagHolder, settings: dict[str, Any]) -> str:
    """Return a train.py command with `settings`, this command's config flags and a new folder."""
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


def define_settings(section: str, **helps: str) -> list[flags.FlagHolder]:
    """Define a flag for each setting of a section of the config, without a default value."""
    define: dict[type, Callable[..., flags.FlagHolder]] = {
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    kinds = {name: type(value) for name, value in base_config()[section].items()}
    return [define[kinds[name]](name, None, text) for name, text in helps.items()]


def changed_settings(section: str, *holders: flags.FlagHolder) -> dict[str, Any]:
    """Return the settings of a section of the config that flags of the same names change.

    Raises:
      UserError: if a value is invalid.
    """
    changed = {holder.name: holder.value for holder in holders if holder.value is not None}
    for name, value in changed.items():
        try:
            check_setting(f"{section}.{name}", value)
        except UserError as error:
            raise UserError(str(error).replace(f"config.{section}.", "--")) from None
    return changed


def check_minutes(minutes: float | None) -> None:
    """Raise UserError if --minutes is not between 0 and a year."""
    if minutes is not None and not 0 < minutes <= MAX_MINUTES:
        raise UserError(f"--minutes={minutes}: must be a number above 0, at most {MAX_MINUTES:,}")


def read_text(text: flags.FlagHolder, file: flags.FlagHolder) -> str:
    """Return the text of the flag `text` or of the file that `file` names, '' for neither.

    Raises:
      UserError: if both flags are given, or the file is empty or cannot be read.
    """
    if text.value and file.value:
        raise UserError(f"--{text.name} and --{file.name}: give one of them")
    if not file.value:
        return text.value
    content = read_text_file(file)
    if not content:
        raise UserError(f"--{file.name}={file.value}: is empty")
    return content


def read_text_file(flag: flags.FlagHolder) -> str:
    """Return the text of the file that `flag` names; raise UserError if it cannot be read."""
    name = f"--{flag.name}={flag.value}"
    try:
        with open(os.path.expanduser(flag.value), "rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)  # some, such as /dev/zero, have no end
    except OSError as error:
        raise UserError(
            f"{name}: cannot be read ({error.strerror or error}); give a UTF-8 file"
        ) from None
    if len(raw) > MAX_FILE_BYTES:
        raise UserError(f"{name}: has more than {MAX_FILE_BYTES:,} bytes; give a smaller file")
    return "".join(decode([raw], name))


def config_error(path: str, error: Exception) -> UserError:
    """Return the UserError for a config file at `path` that raised `error`."""
    return UserError(
        f"--config={path}: raised {type(error).__name__}: {error}; it must define get_config()"
    )


def normalise(argv: list[str]) -> list[str]:
    """Return `argv` with every config flag checked and in the form --config.KEY=VALUE.

    For a mistyped key or a missing file, config_flags would print a traceback.
    """
    files: list[str] = []  # the last one wins, and comes before the settings that change it
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
        if key in ("data.path", "init_from"):
            value = given_path(value)
        normal.append(f"--config.{key}={value}")
    return [*normal[:1], *files[-1:], *normal[1:]]


def _config_path(name: str) -> Path:
    """Return the path of a config file, given by its path or its name in configs/."""
    in_repository = REPOSITORY / name
    by_name = REPOSITORY / "configs" / f"{name}.py"
    for path in (Path(os.path.expanduser(name)), in_repository, by_name):
        if name and path.is_file():
            return path.resolve()
    known = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py"))
    near = difflib.get_close_matches(Path(name).stem, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--config={name}: no such file; {hint}configs/ has {', '.join(known)}")


def fail(error: Exception) -> int:
    """Print `error` as one line, after its traceback if --debug is set; return the exit code."""
    if "--debug" in sys.argv:  # flags may not be parsed yet
        traceback.print_exception(error)
    streams.show_error(one_line(error))
    return getattr(error, "exit_code", 2)
