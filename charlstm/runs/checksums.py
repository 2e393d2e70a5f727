"""Metadata and checksums of checkpoints."""

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
from charlstm.parallel.sharding import to_host
from charlstm.steps import TrainState


def read_metadata(folder: epath.Path) -> dict[str, Any]:
    """Return `metadata`, `loss`, `crc32` and `types` of the checkpoint in `folder`.

    Raises:
      DamagedError: if they are missing or have changed since they were written.
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
    """Return a CRC-32 of type, shape and content of each leaf by its path.

    They do not depend on the sharding.
    """
    return by_name(_crc, state)


def by_name(function: Callable[[Any], Any], state: Any) -> dict[str, Any]:
    """Return the value of `function` for each leaf of `state` but placeholders, by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    name_of = partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name_of(path): function(leaf) for path, leaf in leaves if leaf is not ocp.PLACEHOLDER}


def check_types(folder: epath.Path, record: dict[str, Any], abstract_state: TrainState) -> None:
    """Raise UserError if the checkpoint in `folder` has other arrays than `abstract_state`."""
    here, there = by_name(type_of, abstract_state), record["types"]
    if ocp.PLACEHOLDER in jax.tree.leaves(abstract_state):
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
            f"({'; '.join(differing[:3])}{more}); use that version and those settings"
        )


def type_of(leaf: Any) -> str:
    """Return the type and shape of an array, such as 'float32(2, 3)'."""
    return f"{leaf.dtype}{leaf.shape}"


def _crc(leaf: Any) -> int:
    start = zlib.crc32(type_of(leaf).encode())
    return zlib.crc32(to_host(leaf).tobytes(), start)


def checksum_of(record: dict[str, Any]) -> int:
    """Return a checksum of the metadata of a checkpoint."""
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def damaged(path: epath.Path, reason: str) -> DamagedError:
    """Return the error for a missing or changed file of a checkpoint."""
    return DamagedError(f"{path}: missing or damaged ({reason}); restore the file, or train on")
