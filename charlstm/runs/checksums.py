"""What is saved beside a state: metadata with a checksum, and type and checksum of each leaf."""

import json
import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from charlstm.errors import DamagedError, UserError
from charlstm.files import read_json
from charlstm.parallel.sharding import whole
from charlstm.steps import TrainState


def read_metadata(folder: epath.Path) -> dict[str, Any]:
    """Return `metadata`, `loss` and `crc32` as they were saved with the checkpoint in `folder`.

    Raises:
      DamagedError: if they are not as they were written.
    """
    path, metrics_path = folder / "metadata" / "metadata", folder / "metrics" / "metrics"
    record, metrics = read_json(path), read_json(metrics_path)
    if not isinstance(record, dict) or not isinstance(metrics, dict):
        raise damaged(path, "not an object")
    if record.pop("checksum", None) != checksum_of(record):
        raise damaged(path, "its checksum differs")
    kinds = {"metadata": dict, "loss": float | None, "crc32": dict, "types": dict}
    if not all(isinstance(record.get(name), kind) for name, kind in kinds.items()):
        raise damaged(path, "an entry is missing or has another type")
    if metrics.get("loss") != (math.inf if record["loss"] is None else record["loss"]):
        raise damaged(metrics_path, f"it has another loss than {path}")
    return record


def checksums(state: Any) -> dict[str, int]:
    """Return a CRC-32 of each leaf's type, shape and content, by its path.

    They are the same however the state lies on devices and processes.
    """
    return by_name(_crc, state)


def by_name(function: Callable[[Any], Any], state: Any) -> dict[str, Any]:
    """Return what `function` gives for each leaf of `state`, placeholders apart, by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    name_of = partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name_of(path): function(leaf) for path, leaf in leaves if leaf is not ocp.PLACEHOLDER}


def check_types(folder: epath.Path, record: dict[str, Any], like: TrainState) -> None:
    """Raise UserError if the checkpoint in `folder` was saved with other arrays than `like` has."""
    here = by_name(type_of, like)
    is_part = ocp.PLACEHOLDER in jax.tree.leaves(like)
    there = record["types"]
    if is_part:
        there = {name: kind for name, kind in there.items() if name in here}
    differing = [
        f"{name} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
        for name in sorted(there | here)
        if there.get(name) != here.get(name)
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"{folder}: was saved by another version of charlstm or with other settings of JAX "
            f"({'; '.join(differing[:3])}{more}); use those that it was saved with"
        )


def type_of(leaf: Any) -> str:
    """Return the type and the shape of an array, as text."""
    return f"{leaf.dtype}{leaf.shape}"


def _crc(leaf: Any) -> int:
    start = zlib.crc32(type_of(leaf).encode())
    return zlib.crc32(whole(leaf).tobytes(), start)


def checksum_of(record: dict[str, Any]) -> int:
    """Return a checksum of the metadata of a checkpoint."""
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def damaged(path: epath.Path, reason: str) -> DamagedError:
    """Return the error for a file of a checkpoint that is not as it was written."""
    return DamagedError(f"{path}: missing or damaged ({reason}); bring the file back, or train on")
