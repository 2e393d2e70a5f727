"""Every setting of a run, with its default and the reason for it, and what values make sense."""

import difflib
import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from charlstm.errors import UserError


def base_config() -> ConfigDict:
    """Return the default recipe, the only place where a setting gets its default."""
    config = ConfigDict()
    # One number decides the initial weights, the order of windows, dropout and the samples.
    config.seed = 0
    # How long to train, in passes over the training text.
    config.num_epochs = 4
    # How long to train, in steps; 0 means as many as num_epochs asks for.
    config.num_steps = 0
    # Few streams mean many updates a minute: with 100 time steps 8 are 0.02 to 0.05 bits better
    # than 16 (Dracula, 512 units, five epochs), and 0.03 better than 16 with 50 (320 units). Gains
    # here and below are of single trials, all of which are in configs/trials.tsv; other seeds moved
    # one of them by 0.04.
    config.batch_size = 8
    # How many characters the gradient reaches back; the carry reaches further.
    config.seq_len = 100
    # How often to measure the validation part and write a sample; 0 means once an epoch.
    config.eval_every_steps = 500
    # How often to save between evaluations (each of which saves as well); 0 means never.
    config.checkpoint_every_steps = 0
    # How often a line goes to metrics.jsonl and TensorBoard.
    config.log_every_steps = 50
    config.data = _data()
    config.model = _model()
    config.optimizer = _optimizer()
    config.sample = _sample()
    config.mesh = _mesh()
    return config


def _data() -> ConfigDict:
    data = ConfigDict()
    # A UTF-8 text, a pattern, or a folder, of which .txt, .gz, .zst, .bz2 and .xz are read; empty
    # means Dracula.
    data.path = ""
    # Fewer distinct characters are easier to learn, at the price of capital letters.
    data.lowercase = False
    # Drops punctuation and symbols: an easier, poorer text.
    data.strip_punctuation = False
    # Characters that are rarer become one symbol, U+FFFD; 1 keeps all. Chinese has thousands.
    data.min_count = 1
    # What stands between documents in a file; each file ends one, too. Empty: one long text.
    data.document_separator = ""
    # The last part of the text, never trained on, tells how well the model has understood.
    data.val_fraction = 0.1
    # But no more than this: on a large text evaluations would take hours. 0 means no limit.
    data.max_val_chars = 2_000_000
    # streams: text in order, the carry handed on; windows: every position, shuffled, no carry.
    data.order = "streams"
    # In streams, how often a row of a batch begins with an empty carry nevertheless, as prompts do:
    # never is too seldom, and a model of ten minutes then failed at some of them altogether; 0.02
    # has cold windows 0.017 bits worse.
    data.reset_rate = 0.05
    # all: every time step predicts its next character; last: one prediction a window.
    data.loss_on = "all"
    return data


def _model() -> ConfigDict:
    model = ConfigDict()
    # fused takes three fifths of the time; flax, the scanned Flax cell, is there to be compared;
    # cudnn, for NVIDIA GPUs only, has not yet been run on one.
    model.recurrence = "fused"
    # The Flax class that model.recurrence=flax scans; both compute the same.
    model.cell = "OptimizedLSTMCell"
    # More units learn more and cost their square.
    model.hidden_size = 384
    # More layers see more structure, once there is time to train them: a minute is for one.
    model.num_layers = 1
    # Applied after every LSTM layer while training: a novel is small enough to be memorised.
    model.dropout_rate = 0.25
    # step: drawn anew at each time step; window: one mask for all of a window (Gal and Ghahramani
    # 2016), which is 0.016 bits better and draws fewer numbers.
    model.dropout_mask = "window"
    # The share of the hidden state that the gates do not see, one mask a row for a window: no use
    # while a text is new, but a quarter of a million characters, read eight times, had 1.951 bits
    # with 0.15 and a dropout_rate of 0.2, where without it 2.002 was the least (384 units).
    model.recurrent_dropout = 0.0
    # The character that is read scales the hidden state that the gates see: 0.017 bits better, for
    # some 5 % of the time.
    model.scale_hidden = True
    # What the gates get from the hidden state is divided by its root mean square: 0.045 bits
    # better, for some 10 % of the time on one core, and 15 % on two.
    model.rms_norm = True
    # Added to the mean square: with 1e-5, what follows an empty carry magnified rounding errors, so
    # that eight devices parted from one by 2 % of the loss within 50 steps.
    model.norm_epsilon = 0.1
    # one_hot: a unit vector a character; embed: a learnt vector; scaled: its number / V.
    model.input = "one_hot"
    # The length of the learnt vector; read only where model.input is embed.
    model.embed_size = 64
    # The output is the product with the same vectors: fewer weights where V is in the thousands.
    model.tie_embeddings = False
    # bfloat16 computes faster on accelerators; parameters and cell state stay float32.
    model.dtype = "float32"
    return model


def _optimizer() -> ConfigDict:
    optimizer = ConfigDict()
    # adamw is adam with weight_decay; cautious_adamw moves nothing against the gradient of its own
    # step, which is 0.018 bits better; keras_adam is adam with epsilon where Keras has it.
    optimizer.name = "cautious_adamw"
    # The peak, after the warm-up; high, since a short run has no time for a careful one.
    optimizer.learning_rate = 1.2e-2
    # How the learning rate falls from its peak: constant, cosine or linear.
    optimizer.schedule = "linear"
    # Where cosine and linear end, as a share of the peak. At 0 a text that is read often is learnt
    # by heart: of 512 units that read Dracula 12 times, 1.74 bits half-way became 1.80.
    optimizer.final_share = 0.2
    # Adam's first steps rest on few gradients, so the rate starts small.
    optimizer.warmup_steps = 100
    # Pulls weights towards 0, which is 0.008 bits better on a novel; for both adamw only.
    optimizer.weight_decay = 0.05
    # Recurrent gradients explode now and then; 0 means no clipping.
    optimizer.clip_norm = 1.0
    # Adam remembers squared gradients for about 1 / (1 - b2) steps; 0.999 is 0.015 bits worse.
    optimizer.b2 = 0.99
    # Evaluated, sampled and kept as best is the average of the weights over about this share of the
    # steps so far, 0.03 to 0.07 bits better than the last ones; 0 means the last ones.
    optimizer.average_share = 0.1
    # Keeps Adam's quotient finite where gradients vanish.
    optimizer.epsilon = 1e-8
    return optimizer


def _sample() -> ConfigDict:
    sample = ConfigDict()
    # What is written at every evaluation, and what launch/sample.py does unless told otherwise.
    sample.length = 400
    # Below 1 the text is more careful, above 1 more daring, and 0 takes the most probable.
    sample.temperature = 0.8
    # Choose among the k most probable characters only; 0 means all.
    sample.top_k = 0
    # Choose among the fewest characters that hold this much probability; 1 means all.
    sample.top_p = 1.0
    # carry: one step a character; window: reread seq_len characters for each, as windows train.
    sample.method = "carry"
    return sample


def _mesh() -> ConfigDict:
    mesh = ConfigDict()
    # How many devices share each batch by its rows; -1 means all that there are.
    mesh.data = -1
    return mesh


Rule = tuple[Callable[[Any], bool], str]


def _count(low: int) -> Rule:
    # Above it JAX's integers end, and with them the messages that anybody understands.
    return (lambda v: low <= v < 2**31), f"a whole number from {low} to {2**31 - 1}"


def _at_least(low: float) -> Rule:
    return (lambda v: low <= v < math.inf), f"a number of at least {low}"


def _above(low: float) -> Rule:
    return (lambda v: low < v < math.inf), f"a number above {low}"


def _fraction(include_one: bool = False) -> Rule:
    if include_one:
        return (lambda v: 0 < v <= 1), "above 0 and at most 1"
    return (lambda v: 0 <= v < 1), "at least 0 and below 1"


def _one_of(*values: str) -> Rule:
    return (lambda v: v in values), " or ".join(values)


_RULES: dict[str, Rule] = {
    "seed": ((lambda v: 0 <= v < 2**32), "from 0 to 4294967295"),
    "num_epochs": _count(1),
    "num_steps": _count(0),
    "batch_size": _count(1),
    "seq_len": _count(1),
    "eval_every_steps": _count(0),
    "checkpoint_every_steps": _count(0),
    "log_every_steps": _count(1),
    "data.min_count": _count(1),
    "data.val_fraction": _fraction(),
    "data.max_val_chars": _count(0),
    "data.order": _one_of("streams", "windows"),
    "data.reset_rate": _fraction(),
    "data.loss_on": _one_of("all", "last"),
    "model.cell": _one_of("OptimizedLSTMCell", "LSTMCell"),
    "model.recurrence": _one_of("fused", "flax", "cudnn"),
    "model.hidden_size": _count(1),
    "model.num_layers": _count(1),
    "model.dropout_rate": _fraction(),
    "model.dropout_mask": _one_of("step", "window"),
    "model.recurrent_dropout": _fraction(),
    "model.input": _one_of("one_hot", "embed", "scaled"),
    "model.embed_size": _count(1),
    "model.norm_epsilon": _above(0),
    "model.dtype": _one_of("float32", "bfloat16"),
    "optimizer.name": _one_of("adam", "adamw", "cautious_adamw", "keras_adam"),
    "optimizer.learning_rate": _above(0),
    "optimizer.schedule": _one_of("constant", "cosine", "linear"),
    "optimizer.final_share": ((lambda v: 0 <= v <= 1), "from 0 to 1"),
    "optimizer.warmup_steps": _count(0),
    "optimizer.weight_decay": _at_least(0),
    "optimizer.clip_norm": _at_least(0),
    "optimizer.b2": _fraction(),
    "optimizer.average_share": _fraction(),
    "optimizer.epsilon": _above(0),
    "mesh.data": ((lambda v: v == -1 or 1 <= v < 2**31), "-1 or a whole number from 1"),
    "sample.length": _count(1),
    "sample.temperature": _at_least(0),
    "sample.top_k": _count(0),
    "sample.top_p": _fraction(include_one=True),
    "sample.method": _one_of("carry", "window"),
}


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Return the settings of `config` as one flat dict, keys in dotted form."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{key}.{name}": inner for name, inner in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def check_key(key: str) -> None:
    """Raise UserError with the nearest valid name if no config has the setting `key`."""
    known = list(flatten(base_config()))
    if key not in known:
        # A forgotten section is as common as a slip of the finger.
        names = {name.split(".")[-1]: name for name in known} | {name: name for name in known}
        near = [names[name] for name in difflib.get_close_matches(key, names, n=1)]
        hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
        raise UserError(f"config.{key}: no such key; {hint}")


def check_setting(key: str, value: Any) -> None:
    """Raise UserError if `value` makes no sense for the setting `key`."""
    if key in _RULES:
        is_valid, allowed = _RULES[key]
        if not is_valid(value):
            raise UserError(f"config.{key}={value}: must be {allowed}")


def validate(config: ConfigDict) -> None:
    """Raise UserError, naming key, value and what is allowed, at the first senseless setting."""
    settings, defaults = flatten(config), flatten(base_config())
    for key, value in settings.items():
        check_key(key)
        if type(value) is not type(defaults[key]):
            wanted = type(defaults[key]).__name__
            raise UserError(f"config.{key}={value!r}: must be of type {wanted}")
        check_setting(key, value)
    for key in defaults:
        if key not in settings:
            raise UserError(f"config.{key}: missing; start from charlstm.config.base_config()")
    if config.data.order == "streams" and config.data.loss_on == "last":
        raise UserError(
            "config.data.loss_on=last: streams would leave most characters unlearnt; "
            "use all, or config.data.order=windows"
        )
    if config.model.recurrence == "cudnn" and config.model.dtype != "float32":
        raise UserError(
            f"config.model.dtype={config.model.dtype}: config.model.recurrence=cudnn takes float32 "
            "only; use fused"
        )
    if config.model.recurrence == "cudnn" and config.data.document_separator:
        raise UserError(
            "config.model.recurrence=cudnn: cannot begin a document within a sequence, as "
            "config.data.document_separator asks for; use fused"
        )
    for part, none in (("scale_hidden", False), ("rms_norm", False), ("recurrent_dropout", 0.0)):
        if config.model.recurrence == "cudnn" and config.model[part]:
            raise UserError(
                f"config.model.{part}={config.model[part]}: config.model.recurrence=cudnn has no "
                f"such thing; use fused, or config.model.{part}={none}"
            )
    if config.model.tie_embeddings and config.model.input != "embed":
        raise UserError(
            f"config.model.tie_embeddings=True: config.model.input={config.model.input} has no "
            "embeddings; use config.model.input=embed"
        )
    optimizer = config.optimizer
    if optimizer.weight_decay and not optimizer.name.endswith("adamw"):
        raise UserError(
            f"config.optimizer.weight_decay={optimizer.weight_decay}: {optimizer.name} has none; "
            "use config.optimizer.name=adamw, or config.optimizer.weight_decay=0"
        )
