"""The rule behind plan.py --minutes: settings for the best text in a time, by text and machine.

A wider model learns more from each character and reads fewer of them. The recipes found on two CPU
cores with Dracula, configs/default.py, medium.py and large.py, read 3.7, 2.3 and 4.5 characters per
parameter. The rule:

- the widest model that still reads CHARS_PER_PARAM characters a parameter in the time;
- the text at most MAX_EPOCHS times, and so a width that needs no more of it;
- 8 streams of 100 on a CPU below five minutes, since many updates win over full vector units, and
  then 16 of 64, which a wide model reads faster; 128 on an accelerator, where few rows cost as much
  as many (not yet tried there);
- dropout of 0.06 for each time that the text is read, up to 0.4;
- where it is read MANY_EPOCHS times and more, a hundredth of the hidden state hidden from the gates
  for each time, up to 0.15: read four times, that did not pay;
- a learning rate of 0.012 up to 448 units, falling with their number beyond;
- where the text is read so often, a rate that ends at 0.4 of its peak: lower ones learn it by heart
  (512 units, 12 times over Dracula: 1.80 bits at a rate of 0, 1.74 before).

That characters and parameters should grow together is Hoffmann et al. 2022 (arXiv 2203.15556).
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from charlstm.config import flatten
from charlstm.planning.cost import count_params, flops_per_char

# Hidden units and layers; two layers where they are wide (Karpathy et al. 2015, arXiv 1506.02078).
WIDTHS = (
    *((64, 1), (96, 1), (128, 1), (192, 1), (256, 1), (320, 1), (384, 1), (512, 1), (640, 1)),
    *((768, 1), (768, 2), (1024, 2), (1536, 2), (2048, 2)),
)
CHARS_PER_PARAM = 3
MAX_EPOCHS = 20
MANY_EPOCHS = 6
MAX_EVALUATIONS = 5
EVALUATION_SHARE = 0.1  # of the time
VAL_CHARS_PER_SECOND = 500
VAL_CHARS = 100_000
# Above it a learnt vector has fewer weights than one-hot characters, and is shared by them.
MANY_CHARACTERS = 512
FIRST_WIDTH = (256, 1)  # to be timed
PROVISIONAL_STEPS = 10_000  # until the time of one is known
ALWAYS = {
    *("batch_size", "seq_len", "num_steps", "eval_every_steps", "optimizer.learning_rate"),
    *("model.hidden_size", "model.num_layers", "model.dropout_rate", "optimizer.end_lr_ratio"),
    "model.recurrent_dropout",
}


class Shape(NamedTuple):
    """B and T."""

    batch_size: int
    seq_len: int


def choose_shape(seconds: float, num_chars: int, is_cpu: bool) -> Shape:
    """Return streams and window for a text of `num_chars` characters to train on.

    Each stream has at least one window; a text too short for that has fewer and shorter ones.
    """
    batch_size, seq_len = (8, 100) if seconds < 300 else (16, 64)
    if not is_cpu:
        batch_size = 128
    seq_len = min(seq_len, max(1, (num_chars - 1) // 2))
    return Shape(max(1, min(batch_size, (num_chars - 1) // seq_len)), seq_len)


def with_streams(config: ConfigDict) -> ConfigDict:
    """Return a copy of `config` that reads the text as streams and learns from each character."""
    config = config.copy_and_resolve_references()
    config.data.order, config.data.loss_on = "streams", "all"
    return config


def with_text(config: ConfigDict, seconds: float, text: Mapping[str, Any]) -> ConfigDict:
    """Return a copy of `config` for a `text`, described as in config.json.

    A held-out part that would take more than its share of the time is cut; and thousands of
    characters are learnt as vectors.
    """
    config = config.copy_and_resolve_references()
    most = max(VAL_CHARS, round(VAL_CHARS_PER_SECOND * seconds))
    if text["validation_characters"] > most:
        config.data.max_val_chars = min(most, config.data.max_val_chars or most)
    if text["vocabulary"] > MANY_CHARACTERS:
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
    """Return the hidden_size and num_layers that the rule asks for.

    Args:
      config: all other settings.
      vocab_size: V.
      num_chars: of the text to train on.
      seconds: for steps alone.
      flops: operations of the forward pass for which training takes a second.
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
    """Return a copy of `config` with dropout and learning rate for `num_epochs` of the text."""
    config = config.copy_and_resolve_references()
    is_many = num_epochs >= MANY_EPOCHS
    config.model.dropout_rate = 0.0 if num_epochs < 1 else min(0.4, round(1.2 * num_epochs) / 20)
    config.model.recurrent_dropout = min(0.15, round(num_epochs) / 100) if is_many else 0.0
    config.optimizer.end_lr_ratio = 0.4 if is_many else 0.2
    peak = 1.2e-2 * min(1.0, 448 / config.model.hidden_size)
    config.optimizer.learning_rate = float(f"{peak:.1e}")
    return config


def choose_evaluations(seconds: float, evaluation_seconds: float) -> int:
    """Return how many evaluations, the last one included, leave the time to training."""
    fitting = seconds * EVALUATION_SHARE / max(evaluation_seconds, 1e-9)
    return int(max(1, min(MAX_EVALUATIONS, fitting)))


def with_length(config: ConfigDict, num_steps: int, num_evaluations: int) -> ConfigDict:
    """Return a copy of `config` for `num_steps` steps, with its last evaluation at the end."""
    config = config.copy_and_resolve_references()
    config.num_steps = num_steps
    config.eval_every_steps = math.ceil(num_steps / num_evaluations)
    return config


def settings_of(proposed: ConfigDict, given: ConfigDict) -> dict[str, Any]:
    """Return the settings to give: all that the rule is about, and what else was changed."""
    after, before = flatten(proposed), flatten(given)
    return {key: value for key, value in after.items() if key in ALWAYS or value != before[key]}
