"""Start a run from the weights of a trained one, whose text may have other characters."""

import hashlib
import logging
import os
import unicodedata
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from charlstm.config import base_config, flatten
from charlstm.config_check import validate
from charlstm.data.vocab import Vocab
from charlstm.errors import UserError
from charlstm.model import CharLSTM, zero_carry
from charlstm.runs.checkpoints import load_model
from charlstm.runs.checksums import by_name, type_of
from charlstm.runs.folder import InitialWeights, Run
from charlstm.system.paths import model_path

logger = logging.getLogger(__name__)

# Settings of the model that another run may choose for the same weights. The recurrences compute
# the same; dropout is for training only.
FREE_KEYS = {
    "model.recurrence",
    "model.dropout_rate",
    "model.variational_dropout",
    "model.recurrent_dropout",
}


class Source(NamedTuple):
    """The trained weights that config.init_from names."""

    path: str  # as given
    config: ConfigDict
    vocab: Vocab
    params: Any  # NumPy arrays
    weights: InitialWeights


def check_other(init_from: str, workdir: epath.Path) -> None:
    """Raise UserError if `init_from` is the run folder `workdir` itself."""
    if model_path(init_from).resolve() == workdir.resolve():
        raise UserError(
            f"config.init_from={init_from}: is the run folder itself; leave it out to resume the "
            "run, or choose another --workdir"
        )


def load_source(init_from: str) -> Source:
    """Return the best weights of the run or file `init_from`.

    Raises:
      UserError: if they cannot be loaded.
    """
    try:
        run, _, params = load_model(init_from)
    except UserError as error:
        raise UserError(f"config.init_from={init_from}: {error}") from error
    params = jax.tree.map(np.asarray, params)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise UserError(f"config.init_from={init_from}: has weights that are not finite")
    path = model_path(init_from).resolve()
    weights = InitialWeights(os.fspath(path), hash_params(params))
    return Source(init_from, run.config, run.vocab, params, weights)


def reload_source(run: Run) -> Source:
    """Return the weights that `run` started from, for another start from its first step.

    Raises:
      UserError: if they cannot be loaded, or have changed since.
    """
    init_from, weights = run.config.init_from, run.initial_weights
    source = load_source(init_from)
    if not weights or source.weights.sha256 != weights.sha256:
        raise UserError(
            f"config.init_from={init_from}: its weights have changed since the run in "
            f"{run.workdir} began, which has no checkpoint; restore them, or choose another "
            "--workdir"
        )
    return source


def inherit_settings(config: ConfigDict, there: ConfigDict, unset: Collection[str]) -> ConfigDict:
    """Return a copy of `config` whose `unset` settings of the model are those of `there`."""
    config = ConfigDict(config.to_dict())  # mutable, unlike a FrozenConfigDict
    for key, value in flatten(there).items():
        if key in unset and is_inherited(key):
            config.update_from_flattened_dict({key: value})
    validate(config)
    return config


def is_inherited(key: str) -> bool:
    """Return whether a run takes the setting `key` from the run whose weights it starts from.

    The fastest recurrence depends on the machine.
    """
    return key.startswith("model.") and key != "model.recurrence"


def check_source(source: Source, config: ConfigDict, vocab: Vocab) -> None:
    """Raise UserError if a model with `config` and `vocab` cannot start from `source`."""
    there = flatten(source.config)
    for key, value in flatten(config).items():
        is_fixed = key.startswith("model.") and key not in FREE_KEYS
        if is_fixed and value != there[key]:
            raise UserError(
                f"config.{key}={value}: is {there[key]} in config.init_from={source.path}; a model "
                f"that starts from its weights needs config.{key}={there[key]}"
            )
    if config.model.input == "scaled" and vocab != source.vocab:
        raise UserError(
            f"config.init_from={source.path}: config.model.input=scaled encodes a character by its "
            f"place among all characters, and the text has others ({len(vocab)} here and "
            f"{len(source.vocab)} there); start from a run with one_hot or embed"
        )


def vocab_axes(model: CharLSTM) -> Any:
    """Return the tree of `model`'s parameters with the index of the axis V, -1 where none is."""

    def shapes(vocab_size: int) -> Any:
        sized = model.clone(vocab_size=vocab_size, recurrence="fused")

        def init() -> Any:
            ids_BT = jnp.zeros((1, 1), jnp.int32)
            return sized.init(jax.random.key(0), ids_BT, zero_carry(sized, 1))["params"]

        return jax.eval_shape(init)

    def axis(leaf: Any, larger: Any) -> int:
        differs = [n != m for n, m in zip(leaf.shape, larger.shape, strict=True)]
        return differs.index(True) if any(differs) else -1

    return jax.tree.map(axis, shapes(model.vocab_size), shapes(model.vocab_size + 1))


def transfer_params(
    params: Any,
    source_vocab: Collection[str],
    fresh_params: Any,
    vocab: Collection[str],
    axes: Any,
) -> tuple[Any, dict[str, str | None], list[str]]:
    """Return `params` for `vocab`, the characters new in it, and those that it lacks.

    Rows of input kernels, embeddings and outputs follow their character from the id in
    `source_vocab` to the id in `vocab`. A new character has the rows of a similar one, to which it
    is mapped in the result, or those of `fresh_params` if it is mapped to None.

    Args:
      params: trained parameters, NumPy arrays, of a model for `source_vocab`.
      source_vocab: the characters of `params`, in the order of their ids.
      fresh_params: initial parameters, NumPy arrays, of the same model for `vocab`.
      vocab: the characters of the new text, likewise.
      axes: vocab_axes of the model.
    """
    old_id = {character: index for index, character in enumerate(source_vocab)}
    added = {char: find_similar(char, old_id) for char in vocab if char not in old_id}
    origins = [added.get(character, character) for character in vocab]
    pairs = [(new, old_id[origin]) for new, origin in enumerate(origins) if origin is not None]
    new_ids, old_ids = np.array(pairs, dtype=int).reshape(-1, 2).T

    def move(leaf: np.ndarray, fresh: np.ndarray, axis: int) -> np.ndarray:
        if axis < 0:
            return leaf
        moved = np.moveaxis(fresh.copy(), axis, 0)
        moved[new_ids] = np.moveaxis(leaf, axis, 0)[old_ids]
        return np.moveaxis(moved, 0, axis)

    dropped = [character for character in source_vocab if character not in vocab]
    return jax.tree.map(move, params, fresh_params, axes), added, dropped


def find_similar(character: str, known: Collection[str]) -> str | None:
    """Return `character` without accents or in another case, if it is `known`, else None."""
    # The compatibility decomposition begins with the base character.
    base = unicodedata.normalize("NFKD", character)[0]
    candidates = base, character.swapcase(), base.swapcase()
    return next((candidate for candidate in candidates if candidate in known), None)


def start_params(source: Source, run: Run, model: CharLSTM, fresh_params: Any) -> Any:
    """Return the initial params of `run`, those of `source`; log its settings and characters."""
    params, added, dropped = transfer_params(
        source.params, source.vocab, fresh_params, run.vocab, vocab_axes(model)
    )
    defaults = flatten(base_config())
    changed = {key: value for key, value in flatten(run.config).items() if value != defaults[key]}
    if settings := [f"{key}={value}" for key, value in changed.items() if is_inherited(key)]:
        logger.info("settings of the model that are not the defaults: %s", ", ".join(settings))
    similar = [f"{char} ({other})" for char, other in added.items() if other]
    logger.info("new characters, with the weights of a similar one: %s", show(similar, " "))
    unlike = [character for character, other in added.items() if other is None]
    logger.info("new characters, with random weights: %s", show(unlike))
    logger.info("dropped characters, which the text does not have: %s", show(dropped))
    return params


def show(items: list[str], separator: str = "") -> str:
    """Return the number of `items` and the first 100 of them, in quotes."""
    more = " ..." if len(items) > 100 else ""
    listed = f" {separator.join(items[:100])!r}{more}" if items else ""
    return f"{len(items):,}{listed}"


def hash_params(params: Any) -> str:
    """Return the SHA-256 of names, types, shapes and values of `params`."""
    digest = hashlib.sha256()
    for name, leaf in sorted(by_name(np.asarray, params).items()):
        digest.update(f"{name} {type_of(leaf)}\n".encode() + leaf.tobytes())
    return digest.hexdigest()
