"""Names, shapes and values of a model's parameters, as an untrusted file has them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from charlstm.errors import DamagedError, UserError
from charlstm.model import CharLSTM, zero_carry
from charlstm.runs.checksums import type_of

MAX_SHOWN = 3


def flatten(params: Any) -> dict[str, np.ndarray]:
    """Return parameters as NumPy arrays by name, such as 'lstm_0.hf.kernel'."""
    return {name: np.asarray(leaf) for name, leaf in flatten_dict(params, sep=".").items()}


def unflatten(path: epath.Path, model: CharLSTM, arrays: Mapping[str, np.ndarray]) -> Any:
    """Return the parameters of `model` from arrays by name.

    Raises:
      UserError: if they are those of another model.
      DamagedError: if a value is not finite.
    """
    # Without this, the sizes in an untrusted config could exhaust the memory.
    num_values = sum(array.size for array in arrays.values())
    embed_size = model.embed_size if model.input == "embed" else 0
    if max(model.num_layers * model.hidden_size, embed_size) > num_values:
        raise _other(
            path,
            [f"{num_values:,} values for {model.num_layers} layers of {model.hidden_size} units"],
        )
    found = {name: type_of(array) for name, array in arrays.items()}
    wanted = {name: type_of(leaf) for name, leaf in flatten_dict(shapes_of(model), sep=".").items()}
    differing = [
        f"{name} is {found.get(name, 'missing')} there and {wanted.get(name, 'not used')} by the "
        "config"
        for name in sorted(found | wanted)
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise _other(path, differing)
    if names := [name for name in sorted(arrays) if not np.isfinite(arrays[name]).all()]:
        raise damaged(path, f"{_listed(names)} has values that are not finite")
    return jax.device_put(unflatten_dict(dict(arrays), sep="."))


def damaged(path: epath.Path, reason: str) -> DamagedError:
    """Return the error for a file with exported weights that cannot be read."""
    return DamagedError(
        f"{path}: not an exported model, or damaged ({reason}); export it again with "
        "launch/export.py"
    )


def shapes_of(model: CharLSTM) -> Any:
    """Return the abstract parameters of `model`, as jax.eval_shape does."""

    def init(key: jax.Array) -> Any:
        return model.init(key, jnp.zeros((1, 1), jnp.int32), zero_carry(model, 1))["params"]

    return jax.eval_shape(init, jax.random.key(0))


def _other(path: epath.Path, differing: list[str]) -> UserError:
    return UserError(
        f"{path}: its weights are not those of its config and vocabulary ({_listed(differing)}); "
        "bring back the files that were exported together"
    )


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - MAX_SHOWN} more" if len(items) > MAX_SHOWN else ""
    return "; ".join(items[:MAX_SHOWN]) + more
