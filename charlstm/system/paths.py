"""Check paths that a user gives, expand `~`, and find the cache folder."""

import importlib.util
import os
import re
from pathlib import Path

from etils import epath

from charlstm.errors import UserError

# Schemes that etils.epath opens: packages of which it needs one, and our extra that installs one.
BUCKETS = {"gs": (("gcsfs", "tensorflow"), "gcs"), "s3": (("s3fs", "tensorflow"), "s3")}
# In place of the path of a run: the small trained model in the package, charlstm/builtin/.
BUILTIN = "builtin"


def given_path(path: str) -> str:
    """Return `path`, local or in a bucket, with `~` expanded.

    Raises:
      UserError: if it is an unsupported address, or if the home folder does not exist.
    """
    # etils treats a leading /gs/ as gs://.
    address = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://", path) or re.match("/(gs|s3)/", path)
    if address is None:
        return _expand(path)
    scheme = address[1]
    if scheme == "file":
        raise UserError(
            f"{path}: file:// is not supported; give the path {path.partition('://')[2]}"
        )
    if scheme not in BUCKETS:
        raise UserError(
            f"{path}: {scheme}:// is not supported, only local paths, gs:// and s3://; download "
            f"the file first, for example by curl -LO {path}"
        )
    packages, extra = BUCKETS[scheme]
    if not any(map(importlib.util.find_spec, packages)):
        raise UserError(
            f"{path}: {scheme}:// needs the package {packages[0]}; install the extra {extra}: "
            f"pip install -e '.[{extra}]'"
        )
    return path


def model_path(path: epath.PathLike) -> epath.Path:
    """Return the path of a run or exported model; the string 'builtin' is the one in the package.

    A folder of that name is './builtin', or a Path object.

    Raises:
      UserError: as given_path.
    """
    if path == BUILTIN:
        return epath.Path(__file__).parents[1] / BUILTIN
    return epath.Path(given_path(os.fspath(path)))


def local_path(path: str) -> str:
    """Return `path` with `~` expanded.

    Raises:
      UserError: if it is an address, or if the home folder does not exist.
    """
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", path):
        raise UserError(f"{path}: must be a local path on this machine")
    return _expand(path)


def _expand(path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.exists(expanded):
        home = Path(path).parts[0]
        raise UserError(f"{path}: no home folder {home}; give the full path, or ./{path}")
    return expanded


def cache_folder() -> Path:
    """Return the cache folder: CHARLSTM_CACHE, or charlstm/ in the cache folder of the user.

    Raises:
      UserError: if there is no home folder.
    """
    if given := os.environ.get("CHARLSTM_CACHE"):
        return Path(local_path(given))
    from platformdirs import user_cache_dir

    try:
        return Path(user_cache_dir("charlstm")).expanduser()
    except RuntimeError:  # neither HOME nor an entry in the password file
        raise UserError(
            "no home folder for the cache; set HOME, or CHARLSTM_CACHE=FOLDER"
        ) from None
