"""Checks of arguments; each raises ValueError with the argument and its value."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(str, choices))}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless `value` is an integer >= `least`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: must be an integer of at least {least}")


def as_float32(value: float) -> float:
    """Return `value` as compiled programs use it: of float32, with subnormal numbers as 0."""
    with np.errstate(over="ignore"):
        rounded = np.float32(value)
    return 0.0 if abs(rounded) < np.finfo(np.float32).tiny else float(rounded)


def check_rate(name: str, value: float) -> None:
    """Raise ValueError unless `value` is at least 0 and less than 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value!r}: must be at least 0 and less than 1")


def check_divides(name: str, value: int, rows: int) -> None:
    """Raise ValueError unless `value` divides `rows`, the rows of a batch."""
    if rows % value:
        raise ValueError(f"{name}={value}: must divide the {rows} rows of the batch")


def check_shape(name: str, result: Any, like: Any) -> None:
    """Raise ValueError unless the result of the function `name` has the shape of `like`."""
    if np.shape(result) != np.shape(like):
        raise ValueError(
            f"{name}: must return an array of shape {np.shape(like)}; got {np.shape(result)}"
        )


def check_ids(name: str, ids: Any, vocab_size: int, ndim: int = 2, least: int = 0) -> None:
    """Raise ValueError unless `ids` are integers from `least` to V - 1 with `ndim` axes.

    Of traced arrays, which have no values, only the type and the number of axes are checked.
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
            invalid = lowest if lowest < least else highest
            raise ValueError(
                f"{name}: ids are 0 to {vocab_size - 1}, with V={vocab_size}; got {invalid}"
            )


def check_sampling(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for an invalid setting of a sampler, a number or an array of numbers.

    Arrays of JAX are not checked, since they may be traced or on a device.
    """
    rules = {
        "temperature": (lambda value: value >= 0, "at least 0"),
        "top_k": (lambda value: value >= 0, "at least 0"),
        "top_p": (lambda value: (value > 0) & (value <= 1), "above 0 and at most 1"),
        "min_p": (lambda value: (value >= 0) & (value <= 1), "from 0 to 1"),
        "repetition_penalty": (lambda value: value >= 0, "at least 0"),
        "repetition_length": (lambda value: value >= 1, "at least 1"),
    }
    for name, (is_valid, allowed) in rules.items():
        value = settings[name]
        if isinstance(value, int | float | np.ndarray | np.generic | list | tuple):
            if not np.all(is_valid(np.asarray(value))):
                raise ValueError(f"{name}={value!r}: must be {allowed}")


def check_batch(batch: Any, vocab_size: int) -> None:
    """Raise ValueError unless the arrays of a Batch have matching shapes and valid ids."""
    check_ids("inputs_BT", batch.inputs_BT, vocab_size)
    check_ids("targets_BT", batch.targets_BT, vocab_size)
    shape = np.shape(batch.inputs_BT)
    if 0 in shape:
        raise ValueError(f"inputs_BT: must have at least one character; got the shape {shape}")
    shapes = {"targets_BT": shape, "weights_BT": shape, "reset_B": shape[:1]}
    for name, wanted in shapes.items():
        if np.shape(getattr(batch, name)) != wanted:
            raise ValueError(
                f"{name}: must have the shape {wanted}, as inputs_BT has {shape}; "
                f"got {np.shape(getattr(batch, name))}"
            )


def check_params(params: Any, wanted: Any) -> None:
    """Raise ValueError unless `params` has the tree, shapes and types of `wanted`."""
    given, needed = _describe(params), _describe(wanted)
    for name in [*needed, *given]:
        if given.get(name) != needed.get(name):
            raise ValueError(
                f"params: {name} is {given.get(name, 'missing')}, and the model has "
                f"{needed.get(name, 'no such parameter')}"
            )


def _values(array: Any) -> np.ndarray | None:
    """Return `array` in NumPy, or None if it is traced or partly in other processes."""
    if isinstance(array, np.ndarray | list | tuple):
        return np.asarray(array)
    import jax  # here, because batches are made without JAX

    if isinstance(array, jax.core.Tracer) or not getattr(array, "is_fully_addressable", True):
        return None
    return jax.device_get(array)


def _describe(tree: Any) -> dict[str, str]:
    """Return type and shape of each leaf by name."""
    import jax

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }
