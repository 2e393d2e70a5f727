"""The trials of a sweep: combinations of settings, texts and seeds."""

import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from charlstm.config import flatten
from charlstm.config_check import check_key, parse_setting, validate
from charlstm.errors import DamagedError, UserError
from charlstm.files import read_json
from charlstm.sweep.texts import VAL_FRACTION
from charlstm.sweep.trials import Trial


def parse_sets(words: Sequence[str]) -> dict[str, list[Any]]:
    """Return the values of each setting from words such as model.hidden_size=256,384.

    Raises:
      UserError: for a word of another form, or a key or value that does not exist.
    """
    varied: dict[str, list[Any]] = {}
    for word in words:
        key, equals, values = word.partition("=")
        if not equals:
            raise UserError(f"--set={word}: must be KEY=VALUE,VALUE,...")
        if key in varied:
            raise UserError(f"--set={word}: {key} is given twice; give all its values in one --set")
        varied[key] = [parse_setting(key, value) for value in values.split(",")]
    return varied


def check_varied(varied: Mapping[str, Sequence[Any]]) -> None:
    """Raise UserError for a setting that does not exist or cannot vary, or for repeated values."""
    for key, values in varied.items():
        check_key(key)
        flag = f"--set={key}={','.join(map(str, values))}"
        check_distinct(flag, values)
        if not values:
            raise UserError(f"{flag}: give at least one value")
        if key == "seed":
            raise UserError(f"{flag}: give seeds in --seeds")
        if key.startswith("data."):
            raise UserError(
                f"{flag}: results on different text cannot be compared; "
                f"set --config.{key} for all trials"
            )


def check_distinct(flag: str, values: Sequence[Any]) -> None:
    """Raise UserError, naming `flag`, if two values are equal."""
    if len(set(values)) < len(values):
        raise UserError(f"{flag}: has a value twice; give each once")


def combine(varied: Mapping[str, Sequence[Any]], number: int | None = None) -> list[dict[str, Any]]:
    """Return all combinations of values in order, or `number` of them drawn at random.

    The draw is deterministic, and a larger `number` adds to the combinations of a smaller one.

    Raises:
      UserError: if there are not so many combinations.
    """
    combinations = [
        dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())
    ]
    if number is None:
        return combinations
    if not 1 <= number <= len(combinations):
        raise UserError(f"--combinations={number}: must be from 1 to {len(combinations)}, all")
    order = list(range(len(combinations)))
    random.Random(0).shuffle(order)
    return [combinations[index] for index in sorted(order[:number])]


def make_trials(
    config: ConfigDict,
    combinations: Sequence[dict[str, Any]],
    texts: Sequence[str],
    seeds: Sequence[int],
) -> list[Trial]:
    """Return the trials in the order in which they run: all combinations with the first seed first.

    Raises:
      UserError: if the config of a trial is invalid.
    """
    trials = []
    for seed, settings, text in itertools.product(seeds, combinations, texts):
        own = config.copy_and_resolve_references()
        own.update_from_flattened_dict({**settings, "seed": seed})
        own.data.path, own.data.val_fraction = "", VAL_FRACTION
        validate(own)
        trials.append(Trial(text, seed, settings, own))
    return trials


def shared_settings(trials: Sequence[Trial]) -> dict[str, Any]:
    """Return the content of sweep.json: which settings vary, and the values of all others."""
    varied = sorted(trials[0].settings)
    config = flatten(trials[0].config)
    fixed = {key: value for key, value in config.items() if key not in (*varied, "seed")}
    return {"varied": varied, "config": fixed}


def refuse_other_sweep(path: Path, shared: dict[str, Any]) -> None:
    """Raise UserError if the sweep.json at `path`, if any, differs from `shared`."""
    if not path.exists():
        return
    found = read_json(epath.Path(path))
    if not isinstance(found, dict) or found.keys() != shared.keys():
        raise DamagedError(f"{path}: damaged; bring the file back, or choose another --out")
    if found["varied"] != shared["varied"]:
        difference = f"it varies {', '.join(found['varied']) or 'nothing'}"
    else:
        there, here = found["config"], shared["config"]
        difference = "; ".join(
            f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
            for key in sorted(here.keys() | there.keys())
            if here.get(key) != there.get(key)
        )
    if difference:
        raise UserError(
            f"{path.parent}: contains another sweep ({difference}); choose another --out"
        )
