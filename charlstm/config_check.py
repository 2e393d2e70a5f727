"""Validation of configs: ranges, types, combinations and misspelt keys."""

import difflib
import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from charlstm.checks import as_float32
from charlstm.config import base_config, flatten
from charlstm.errors import UserError

Rule = tuple[Callable[[Any], bool], str]


def _count(low: int) -> Rule:
    # Larger numbers exceed JAX's integers, which gives unclear errors later.
    return (lambda v: low <= v < 2**31), f"a whole number from {low} to {2**31 - 1}"


def _at_least(low: float) -> Rule:
    return (lambda v: low <= v < math.inf), f"a number of at least {low}"


def _above(low: float) -> Rule:
    return (lambda v: low < v < math.inf), f"a number above {low}"


def _fraction(include_one: bool = False) -> Rule:
    if include_one:
        return (lambda v: 0 < v <= 1), "above 0 and at most 1"
    return (lambda v: 0 <= v < 1), "at least 0 and below 1"


def _share() -> Rule:
    return (lambda v: 0 <= v <= 1), "from 0 to 1"


def _one_of(*values: str) -> Rule:
    return (lambda v: v in values), " or ".join(values)


_RULES: dict[str, Rule] = {
    "seed": ((lambda v: 0 <= v < 2**32), "from 0 to 4294967295"),
    "num_epochs": _count(1),
    "num_steps": _count(0),
    "batch_size": _count(1),
    "seq_len": _count(1),
    "eval_every_steps": _count(0),
    "patience": _count(0),
    "checkpoint_every_steps": _count(0),
    "log_every_steps": _count(1),
    "data.min_count": _count(1),
    "data.val_fraction": _fraction(),
    "data.max_val_chars": _count(0),
    "data.order": _one_of("streams", "windows"),
    "data.state_reset_prob": _fraction(),
    "data.loss_on": _one_of("all", "last"),
    "model.recurrence": _one_of("auto", "fused", "native", "flax", "cudnn"),
    "model.hidden_size": _count(1),
    "model.num_layers": _count(1),
    "model.dropout_rate": _fraction(),
    "model.recurrent_dropout": _fraction(),
    "model.input": _one_of("one_hot", "embed", "scaled"),
    "model.embed_size": _count(1),
    "model.norm_epsilon": _above(0),
    "model.dtype": _one_of("float32", "bfloat16"),
    "optimizer.name": _one_of("adam", "adamw", "cautious_adamw", "keras_adam"),
    "optimizer.learning_rate": _above(0),
    "optimizer.schedule": _one_of("constant", "cosine", "linear"),
    "optimizer.end_lr_ratio": _share(),
    "optimizer.warmup_steps": _count(0),
    "optimizer.weight_decay": _at_least(0),
    "optimizer.clip_norm": _at_least(0),
    "optimizer.b2": _fraction(),
    "optimizer.average_window": _fraction(),
    "optimizer.epsilon": _above(0),
    "mesh.data": ((lambda v: v == -1 or 1 <= v < 2**31), "-1 or a whole number from 1"),
    "sample.length": _count(1),
    "sample.temperature": _at_least(0),
    "sample.top_k": _count(0),
    "sample.top_p": _fraction(include_one=True),
    "sample.min_p": _share(),
    "sample.repetition_penalty": _at_least(0),
    "sample.repetition_length": _count(1),
    "sample.method": _one_of("carry", "window"),
}


def check_key(key: str) -> None:
    """Raise UserError, with the nearest valid key, if there is no setting `key`."""
    known = list(flatten(base_config()))
    if key not in known:
        # The name alone, without its section, also counts as near.
        names = {name.split(".")[-1]: name for name in known} | {name: name for name in known}
        near = [names[name] for name in difflib.get_close_matches(key, names, n=1)]
        hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
        raise UserError(f"config.{key}: no such key; {hint}")


def check_setting(key: str, value: Any) -> None:
    """Raise UserError if `value` is out of range for the setting `key`."""
    if key in _RULES:
        is_valid, allowed = _RULES[key]
        if not is_valid(value):
            raise UserError(f"config.{key}={value}: must be {allowed}")
        if isinstance(value, float) and not is_valid(as_float32(value)):
            raise UserError(
                f"config.{key}={value}: must be {allowed}; in float32 it is {as_float32(value)}"
            )


def validate(config: ConfigDict) -> None:
    """Raise UserError for the first invalid setting, with its key, value and allowed values."""
    settings, defaults = flatten(config), flatten(base_config())
    for key, value in settings.items():
        if key not in defaults:
            check_key(key)  # raises, and names the nearest key
        if type(value) is not type(defaults[key]):
            wanted = type(defaults[key]).__name__
            raise UserError(f"config.{key}={value!r}: must be of type {wanted}")
        check_setting(key, value)
    for key in defaults:
        if key not in settings:
            raise UserError(f"config.{key}: missing; start from charlstm.config.base_config()")
    _check_combinations(config)


def _check_combinations(config: ConfigDict) -> None:
    data, model, optimizer = config.data, config.model, config.optimizer
    if config.patience and not data.val_fraction:
        raise UserError(
            f"config.patience={config.patience}: needs a validation part; set "
            "config.data.val_fraction above 0, or config.patience=0"
        )
    if data.order == "streams" and data.loss_on == "last":
        raise UserError(
            "config.data.loss_on=last: needs config.data.order=windows; for streams use all"
        )
    if model.recurrence == "cudnn":
        if model.dtype != "float32":
            raise UserError(
                f"config.model.dtype={model.dtype}: config.model.recurrence=cudnn supports float32 "
                "only; use fused"
            )
        if data.document_separator:
            raise UserError(
                "config.model.recurrence=cudnn: cannot reset the carry within a sequence, which "
                "config.data.document_separator needs; use fused"
            )
        for part in ("multiplicative", "recurrent_rms_norm", "recurrent_dropout"):
            if model[part]:
                off = type(model[part])()
                raise UserError(
                    f"config.model.{part}={model[part]}: config.model.recurrence=cudnn does not "
                    f"support it; use fused, or config.model.{part}={off}"
                )
    if model.tie_embeddings and model.input != "embed":
        raise UserError(
            f"config.model.tie_embeddings=True: config.model.input={model.input} has no "
            "embeddings; use config.model.input=embed"
        )
    if optimizer.weight_decay and not optimizer.name.endswith("adamw"):
        raise UserError(
            f"config.optimizer.weight_decay={optimizer.weight_decay}: {optimizer.name} has no "
            "weight decay; use config.optimizer.name=adamw, or config.optimizer.weight_decay=0"
        )


def parse_setting(key: str, word: str) -> Any:
    """Parse the value of the setting `key` from `word` of a command line.

    Raises:
      UserError: if there is no such setting, or `word` is not of its type.
    """
    check_key(key)
    kind = type(flatten(base_config())[key])
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[word.lower()]
        return kind(word)
    except (KeyError, ValueError):
        raise UserError(f"config.{key}={word}: must be {names[kind]}") from None
