"""Paths that a user gives: `~` expanded, addresses checked; and the user's cache."""

import importlib.util
import os
import re
from pathlib import Path

from charlstm.errors import UserError

# What etils.epath opens, with any one of these packages; and the extra of ours that brings one.
BUCKETS = {"gs": (("gcsfs", "tensorflow"), "gcs"), "s3": (("s3fs", "tensorflow"), "s3")}


def given_path(path: str) -> str:
    """Return `path`, a local one or a bucket's, with `~` expanded.

    Raises:
      UserError: if it is an address that cannot be opened, or there is no such home folder.
    """
    # etils takes /gs/ at the beginning for gs://.
    address = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://", path) or re.match("/(gs|s3)/", path)
    if address is None:
        return _expand(path)
    scheme = address[1]
    if scheme == "file":
        raise UserError(f"{path}: give the path without file://, {path.partition('://')[2]}")
    if scheme not in BUCKETS:
        raise UserError(
            f"{path}: {scheme}:// is not supported, only local paths, gs:// and s3://; download "
            "the file first, for example with: curl -LO ADDRESS"
        )
    packages, extra = BUCKETS[scheme]
    if not any(map(importlib.util.find_spec, packages)):
        raise UserError(
            f"{path}: {scheme}:// needs {packages[0]}, which comes with the extra {extra}: "
            f"pip install -e '.[{extra}]'"
        )
    return path


def local_path(path: str) -> str:
    """Return `path` with `~` expanded.

    Raises:
      UserError: if it is an address, or there is no such home folder.
    """
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", path):
        raise UserError(f"{path}: must be on this machine; give a local path")
    return _expand(path)


def _expand(path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.exists(expanded):
        home = Path(path).parts[0]
        raise UserError(f"{path}: there is no home folder {home}; give the whole path, or ./{path}")
    return expanded


def cache_folder() -> Path:
    """Return the folder for what is kept between runs: CHARLSTM_CACHE, or the user's cache.

    Raises:
      UserError: if the user has no home folder.
    """
    if given := os.environ.get("CHARLSTM_CACHE"):
        return Path(local_path(given))
    from platformdirs import user_cache_dir

    try:
        return Path(user_cache_dir("charlstm")).expanduser()
    except RuntimeError:  # neither HOME nor an entry in the password file
        raise UserError(
            "there is no home folder for the cache; set HOME, or CHARLSTM_CACHE=FOLDER"
        ) from None
