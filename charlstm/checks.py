"""Checks of what a programmer passes: each raises ValueError with the argument and its value."""

from typing import Any

import numpy as np


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(str, choices))}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: must be an integer of at least {least}")


def check_rate(name: str, value: float) -> None:
    """Raise ValueError unless `value` is at least 0 and less than 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value!r}: must be at least 0 and less than 1")


def check_divides(name: str, value: int, rows: int) -> None:
    """Raise ValueError unless `value` divides a number of rows."""
    if rows % value:
        raise ValueError(f"{name}={value}: must divide the {rows} rows of the batch")


def check_shape(name: str, found: Any, like: Any) -> None:
    """Raise ValueError unless what the function `name` returned has the shape of `like`."""
    if np.shape(found) != np.shape(like):
        raise ValueError(
            f"{name}: must return an array of the shape {np.shape(like)}; it returned one of "
            f"{np.shape(found)}"
        )


def check_ids(name: str, ids: Any, vocab_size: int, ndim: int = 2, least: int = 0) -> None:
    """Raise ValueError unless `ids` are integers with `ndim` axes, from `least` to V - 1.

    Traced arrays have no values yet, and only their type and number of axes are checked.
    """
    dtype = getattr(ids, "dtype", None) or np.asarray(ids).dtype
    if not np.issubdtype(dtype, np.integer):
        raise ValueError(f"{name}: must be integers, the ids of characters; got {dtype}")
    if np.ndim(ids) != ndim:
        axes = {1: "one axis", 2: "two axes, rows and time"}[ndim]
        raise ValueError(f"{name}: must have {axes}; got the shape {np.shape(ids)}")
    values = _values(ids)
    if values is not None and values.size:
        lowest, highest = int(values.min()), int(values.max())
        if lowest < least or highest >= vocab_size:
            wrong = lowest if lowest < least else highest
            raise ValueError(
                f"{name}: ids are 0 to {vocab_size - 1}, with V={vocab_size}; got {wrong}"
            )


def check_batch(batch: Any, vocab_size: int) -> None:
    """Raise ValueError unless the arrays of a Batch have shapes and ids that agree."""
    check_ids("inputs_BT", batch.inputs_BT, vocab_size)
    check_ids("targets_BT", batch.targets_BT, vocab_size)
    shape = np.shape(batch.inputs_BT)
    if 0 in shape:
        raise ValueError(f"inputs_BT: must have at least one character; got the shape {shape}")
    wanted = {"targets_BT": shape, "weights_BT": shape, "reset_B": shape[:1]}
    for name, shape_wanted in wanted.items():
        if np.shape(getattr(batch, name)) != shape_wanted:
            raise ValueError(
                f"{name}: must have the shape {shape_wanted}, as inputs_BT has {shape}; "
                f"got {np.shape(getattr(batch, name))}"
            )


def check_params(params: Any, wanted: Any) -> None:
    """Raise ValueError if the tree, a shape or a type of `params` is not that of `wanted`."""
    found, needed = _described(params), _described(wanted)
    for name in [*needed, *found]:
        if found.get(name) != needed.get(name):
            raise ValueError(
                f"params: {name} is {found.get(name, 'missing')}, and the model has "
                f"{needed.get(name, 'no such parameter')}"
            )


def _values(array: Any) -> np.ndarray | None:
    """Return the numbers of `array`, or None if it is traced, or in part in other processes."""
    if isinstance(array, np.ndarray | list | tuple):
        return np.asarray(array)
    import jax  # not at the top, since batches are made without it

    if isinstance(array, jax.core.Tracer) or not getattr(array, "is_fully_addressable", True):
        return None
    return jax.device_get(array)


def _described(tree: Any) -> dict[str, str]:
    import jax

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }
