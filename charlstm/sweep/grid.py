"""Which trials sweep.py runs, from its flags; what all of them have in common."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from charlstm.config import flatten
from charlstm.config_check import parse_setting, validate
from charlstm.errors import DamagedError, UserError
from charlstm.files import read_json
from charlstm.sweep.runner import VAL_FRACTION, Trial


def parse_sets(words: Sequence[str]) -> dict[str, list[Any]]:
    """Return the values of each setting to vary, from words such as model.hidden_size=256,384.

    Raises:
      UserError: for one that is none, or may not vary.
    """
    found: dict[str, list[Any]] = {}
    for word in words:
        key, equals, values = word.partition("=")
        if not equals:
            raise UserError(f"--set={word}: must be KEY=VALUE,VALUE,...")
        if key in found:
            raise UserError(f"--set={word}: {key} is given twice; give all its values in one --set")
        if key == "seed":
            raise UserError(f"--set={word}: give seeds in --seeds")
        found[key] = distinct(f"--set={word}", [parse_setting(key, v) for v in values.split(",")])
        if key.startswith("data."):
            raise UserError(
                f"--set={word}: decides what is measured, so that figures could not be compared; "
                f"give all trials the same --config.{key}"
            )
    return found


def distinct(given: str, values: list[Any]) -> list[Any]:
    """Return `values`; raise UserError, naming what was `given`, if two are the same."""
    if len(set(values)) < len(values):
        raise UserError(f"{given}: has a value twice; give each once")
    return values


def combine(varied: dict[str, list[Any]], number: int | None, seed: int) -> list[dict[str, Any]]:
    """Return all combinations in order, or the `number` of them that `seed` draws.

    More of them are those and others.

    Raises:
      UserError: if there are fewer.
    """
    every = [
        dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())
    ]
    if number is None:
        return every
    if number > len(every):
        raise UserError(f"--trials={number}: there are {len(every)} combinations; give fewer")
    order = list(range(len(every)))
    random.Random(seed).shuffle(order)
    return [every[index] for index in sorted(order[:number])]


def make_trials(
    config: ConfigDict,
    combinations: Sequence[dict[str, Any]],
    texts: Sequence[str],
    seeds: list[int],
) -> list[Trial]:
    """Return the trials in the order in which they run: one seed of all combinations comes first.

    Raises:
      UserError: if one has a senseless config.
    """
    trials = []
    for seed, settings, text in itertools.product(seeds, combinations, texts):
        own = config.copy_and_resolve_references()
        own.update_from_flattened_dict({**settings, "seed": seed})
        own.data.path, own.data.val_fraction = "", VAL_FRACTION
        validate(own)
        trials.append(Trial(text, seed, settings, own))
    return trials


def common(trials: Sequence[Trial]) -> dict[str, Any]:
    """Return what sweep.json says of a sweep."""
    varied = sorted(trials[0].settings)
    config = flatten(trials[0].config)
    fixed = {key: value for key, value in config.items() if key not in (*varied, "seed")}
    return {"varied": varied, "config": fixed}


def refuse_other(path: Path, about: dict[str, Any]) -> None:
    """Raise UserError if there is a sweep in the folder of `path` that is not `about`."""
    if not path.exists():
        return
    theirs = read_json(epath.Path(path))
    if not isinstance(theirs, dict) or theirs.keys() != about.keys():
        raise DamagedError(f"{path}: is not as it was written; mend it, or choose another --out")
    if theirs["varied"] != about["varied"]:
        what = f"it varies {', '.join(theirs['varied']) or 'nothing'}"
    else:
        there, here = theirs["config"], about["config"]
        what = "; ".join(
            f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
            for key in sorted(here.keys() | there.keys())
            if here.get(key) != there.get(key)
        )
    if what:
        raise UserError(f"{path.parent}: has another sweep ({what}); choose another --out")
