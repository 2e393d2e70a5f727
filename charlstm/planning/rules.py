"""Rules that choose settings for a text, a time and a machine.

A wider model learns more per character, but reads fewer characters in the same time; parameters and
data should grow together (Hoffmann et al. 2022, arXiv 2203.15556). README.md lists the rules.
"""

import math
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from charlstm.config import flatten
from charlstm.planning.cost import count_params, flops_per_char

# Hidden units and layers; wide models have two layers (Karpathy et al. 2015, arXiv 1506.02078).
WIDTHS = (
    *((64, 1), (96, 1), (128, 1), (192, 1), (256, 1), (320, 1), (384, 1), (512, 1), (640, 1)),
    *((768, 1), (768, 2), (1024, 2), (1536, 2), (2048, 2)),
)
CHARS_PER_PARAM = 3
MAX_EPOCHS = 20
MANY_EPOCHS = 6
MAX_EVALUATIONS = 5
EVALUATION_SHARE = 0.1  # of the time
VAL_CHARS_PER_SECOND = 500  # of the time
MIN_VAL_CHARS = 100_000
LARGE_VOCAB = 512  # above it embeddings take fewer parameters than one-hot characters
FIRST_WIDTH = (256, 1)  # to be timed
PROVISIONAL_STEPS = 10_000  # until the time of a step is known
PROPOSED_KEYS = {
    *("batch_size", "seq_len", "num_steps", "eval_every_steps", "optimizer.learning_rate"),
    *("model.hidden_size", "model.num_layers", "model.dropout_rate", "optimizer.end_lr_ratio"),
    "model.recurrent_dropout",
}


class Shape(NamedTuple):
    """The shape [B, T] of a batch."""

    batch_size: int
    seq_len: int


def choose_shape(seconds: float, num_chars: int, is_cpu: bool) -> Shape:
    """Return B and T for a training text of `num_chars` characters.

    They are reduced for a short text, so that each stream has at least one window.
    """
    batch_size, seq_len = (8, 100) if seconds < 300 else (16, 64)
    if not is_cpu:
        batch_size = 128
    seq_len = min(seq_len, max(1, (num_chars - 1) // 2))
    return Shape(max(1, min(batch_size, (num_chars - 1) // seq_len)), seq_len)


def with_streams(config: ConfigDict) -> ConfigDict:
    """Return a copy of `config` that reads streams and computes the loss on all characters."""
    config = config.copy_and_resolve_references()
    config.data.order, config.data.loss_on = "streams", "all"
    return config


def with_text_limits(
    config: ConfigDict, seconds: float, num_val_chars: int, vocab_size: int
) -> ConfigDict:
    """Return a copy of `config` adapted to a large validation text or vocabulary.

    Its num_steps is provisional, and replaced by with_length.
    """
    config = config.copy_and_resolve_references()
    max_val_chars = max(MIN_VAL_CHARS, round(VAL_CHARS_PER_SECOND * seconds))
    if num_val_chars > max_val_chars:
        config.data.max_val_chars = min(max_val_chars, config.data.max_val_chars or max_val_chars)
    if vocab_size > LARGE_VOCAB:
        config.model.input = "embed"
    config.num_steps = PROVISIONAL_STEPS
    return config


def with_width(config: ConfigDict, width: tuple[int, int]) -> ConfigDict:
    """Return a copy of `config` with the hidden_size and num_layers of `width`."""
    config = config.copy_and_resolve_references()
    config.model.hidden_size, config.model.num_layers = width
    return config


def widest(
    config: ConfigDict, vocab_size: int, num_chars: int, seconds: float, flops: float
) -> tuple[int, int]:
    """Return hidden_size and num_layers of the widest model for a text and a time.

    It reads at least CHARS_PER_PARAM characters per parameter, in at most MAX_EPOCHS epochs.

    Args:
      config: all other settings.
      vocab_size: V.
      num_chars: the number of training characters.
      seconds: the time for steps alone.
      flops: how many operations of the forward pass are trained per second.
    """
    chosen = WIDTHS[0]
    for width in WIDTHS:
        candidate = with_width(config, width)
        num_params = count_params(candidate, vocab_size)
        chars_read = seconds * flops / flops_per_char(candidate, vocab_size)
        if min(chars_read, MAX_EPOCHS * num_chars) < CHARS_PER_PARAM * num_params:
            break
        chosen = width
    return chosen


def with_rates(config: ConfigDict, num_epochs: float) -> ConfigDict:
    """Return a copy of `config` with dropout and learning rate for `num_epochs` epochs."""
    config = config.copy_and_resolve_references()
    is_many = num_epochs >= MANY_EPOCHS
    config.model.dropout_rate = 0.0 if num_epochs < 1 else min(0.4, round(1.2 * num_epochs) / 20)
    config.model.recurrent_dropout = min(0.15, round(num_epochs) / 100) if is_many else 0.0
    config.optimizer.end_lr_ratio = 0.4 if is_many else 0.2
    peak = 1.2e-2 * min(1.0, 448 / config.model.hidden_size)
    config.optimizer.learning_rate = float(f"{peak:.1e}")
    return config


def choose_evaluations(seconds: float, evaluation_seconds: float) -> int:
    """Return the number of evaluations that take at most EVALUATION_SHARE of `seconds`."""
    fitting = seconds * EVALUATION_SHARE / max(evaluation_seconds, 1e-9)
    return int(max(1, min(MAX_EVALUATIONS, fitting)))


def with_length(config: ConfigDict, num_steps: int, num_evaluations: int) -> ConfigDict:
    """Return a copy of `config` with `num_steps` steps and the last evaluation at the end."""
    config = config.copy_and_resolve_references()
    config.num_steps = num_steps
    config.eval_every_steps = math.ceil(num_steps / num_evaluations)
    return config


def proposed_settings(proposed: ConfigDict, given: ConfigDict) -> dict[str, Any]:
    """Return the settings of `proposed` that a rule chose or that differ from `given`."""
    after, before = flatten(proposed), flatten(given)
    return {
        key: value for key, value in after.items() if key in PROPOSED_KEYS or value != before[key]
    }
