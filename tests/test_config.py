import importlib.util
import inspect
import math
import re
from pathlib import Path

import pytest
from helpers import config_with
from ml_collections import ConfigDict

import charlstm.config
from charlstm.config import base_config, flatten
from charlstm.config_check import check_key, check_setting, validate
from charlstm.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CONFIG_FILES = sorted((ROOT / "configs").glob("*.py"))
DEFAULTS = flatten(base_config())
NAN, INF = math.nan, math.inf


def refusal_of(config: ConfigDict) -> str:
    with pytest.raises(UserError) as error:
        validate(config)
    message = str(error.value)
    assert "\n" not in message
    return message


# --- recipes ---


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_complete(path):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    validate(config)
    assert flatten(config).keys() == DEFAULTS.keys()
    # A launcher that changes its config must not change the next one.
    config.seed += 1
    assert module.get_config().seed != config.seed


def test_configs_contains_the_recipes():
    # Otherwise the test above could pass without any.
    assert {"default", "tiny", "tutorial"} <= {path.stem for path in CONFIG_FILES}


def test_base_config_returns_a_new_object_each_time():
    config = base_config()
    config.model.hidden_size += 1
    assert base_config().model.hidden_size == config.model.hidden_size - 1


def test_flatten_joins_keys_with_dots():
    config = ConfigDict({"a": 1, "b": {"c": "x", "d": {"e": 2.0}}})
    assert flatten(config) == {"a": 1, "b.c": "x", "b.d.e": 2.0}


def test_each_setting_has_a_comment_of_at_most_two_lines():
    source = inspect.getsource(charlstm.config)
    assignment = r"^    \w+\.\w+ = [^_\n]"  # of a value, not of a section
    assert len(re.findall(assignment, source, re.MULTILINE)) == len(DEFAULTS)
    commented = rf"^(?!    #).*\n(?:    # .*\n){{1,2}}(?={assignment})"
    assert len(re.findall(commented, source, re.MULTILINE)) == len(DEFAULTS)


# --- values ---

# Settings that take any text.
FREE = {"init_from", "data.path", "data.document_separator"}
# By the type of a setting: values that no setting takes.
OUT_OF_RANGE = {int: [-2, 2**32], float: [NAN, INF, -INF, -0.1], str: ["", "nonsense"], bool: []}


@pytest.mark.parametrize("key", sorted(DEFAULTS.keys() - FREE))
def test_setting_out_of_range_is_refused(key):
    for value in OUT_OF_RANGE[type(DEFAULTS[key])]:
        message = refusal_of(config_with({key: value}))
        assert message.startswith(f"config.{key}={value}: must be ")
        # The launchers check one setting at a time.
        with pytest.raises(UserError) as error:
            check_setting(key, value)
        assert str(error.value) == message


# For each kind of range: the last value inside, and one outside.
BOUNDS = [
    ("seed", 2**32 - 1, 2**32),
    ("num_epochs", 1, 0),
    ("num_steps", 0, -1),
    ("batch_size", 2**31 - 1, 2**31),
    ("data.val_fraction", 0.0, -0.1),
    ("model.dropout_rate", 0.999, 1.0),
    ("model.norm_epsilon", 1e-9, 0.0),
    # Compiled programs use float32, where these values are infinite, 0 or 1.
    ("model.norm_epsilon", 3e38, 3.4028235677973366e38),
    ("model.norm_epsilon", 2e-38, 1e-38),
    ("optimizer.learning_rate", 3e38, 1e39),
    ("optimizer.epsilon", 1e-30, 1e-50),
    ("optimizer.weight_decay", 0.05, 1e39),
    ("optimizer.clip_norm", 3e38, 1e308),
    ("optimizer.b2", 0.9999999, 0.99999999),
    ("sample.temperature", 1e-50, 1e39),
    ("optimizer.end_lr_ratio", 1.0, 1.01),
    ("optimizer.clip_norm", 0.0, -1e-9),
    ("sample.top_p", 0.01, 0.0),
    ("sample.top_p", 1.0, 1.01),
    ("sample.min_p", 1.0, 1.01),
    ("sample.repetition_penalty", 0.0, -0.1),
    ("sample.repetition_length", 1, 0),
    ("mesh.data", -1, 0),
    ("model.dtype", "bfloat16", "float16"),
]


@pytest.mark.parametrize(("key", "inside", "outside"), BOUNDS)
def test_ranges_end_where_documented(key, inside, outside):
    assert validate(config_with({key: inside})) is None
    assert refusal_of(config_with({key: outside})).startswith(f"config.{key}={outside}: must be ")


def test_numbers_too_large_for_a_float_are_compared():
    assert refusal_of(config_with({"batch_size": -(10**400)})).startswith("config.batch_size=-1000")


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("batch_size", 16.0, "int"),
        ("batch_size", True, "int"),
        ("seed", None, "int"),
        ("data.lowercase", 1, "bool"),
        ("data.path", 7, "str"),
        ("data.order", ("streams",), "str"),
        ("data.val_fraction", 0, "float"),
        ("model.dropout_rate", "0.1", "float"),
    ],
)
def test_value_of_the_wrong_type_is_refused(key, value, wanted):
    message = refusal_of(config_with({key: value}))
    assert message == f"config.{key}={value!r}: must be of type {wanted}"


# --- keys ---


@pytest.mark.parametrize("key", ["seed", "model.hidden_size"])
def test_missing_key_is_refused(key):
    config = base_config()
    *section, name = key.split(".")
    del (config[section[0]] if section else config)[name]
    assert f"config.{key}: missing" in refusal_of(config)


def test_missing_section_is_refused():
    config = base_config()
    del config["data"]
    assert "config.data." in refusal_of(config)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("batchsize", "batch_size"),
        ("hidden_size", "model.hidden_size"),
        ("model.hiden_size", "model.hidden_size"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
        # Short names, which resemble no dotted key.
        ("top_k", "sample.top_k"),
        ("ordr", "data.order"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_one(key, nearest):
    with pytest.raises(UserError) as error:
        check_key(key)
    assert str(error.value) == f"config.{key}: no such key; did you mean {nearest}?"
    assert refusal_of(config_with({key: 1})) == str(error.value)


def test_unknown_key_without_a_near_one_is_refused_with_all_keys():
    with pytest.raises(UserError) as error:
        check_key("xyzzy")
    assert all(key in str(error.value) for key in DEFAULTS)


def test_number_in_place_of_a_section_is_refused():
    assert refusal_of(config_with({"model": 256})).startswith("config.model: ")


# --- combinations ---


def test_streams_need_a_loss_on_all_characters():
    config = config_with({"data.order": "streams", "data.loss_on": "last"})
    message = refusal_of(config)
    assert message.startswith("config.data.loss_on=last: ")
    assert "config.data.order=windows" in message
    config.data.order = "windows"
    assert validate(config) is None


def test_patience_needs_a_validation_part():
    config = config_with({"patience": 2, "data.val_fraction": 0.0})
    assert refusal_of(config).startswith("config.patience=2: ")
    config.data.val_fraction = 0.1
    assert validate(config) is None


def test_cudnn_supports_float32_only():
    config = config_with({"model.recurrence": "cudnn", "model.dtype": "bfloat16"})
    assert refusal_of(config).startswith("config.model.dtype=bfloat16: ")


def test_cudnn_supports_the_plain_layer_only():
    config = config_with({"model.recurrence": "cudnn", "model.recurrent_dropout": 0.1})
    for key, off in (
        ("multiplicative", False),
        ("recurrent_rms_norm", False),
        ("recurrent_dropout", 0.0),
    ):
        message = refusal_of(config)
        assert message.startswith(f"config.model.{key}={config.model[key]}: ")
        assert message.endswith(f"config.model.{key}={off}")
        config.model[key] = off
    assert validate(config) is None


def test_weight_decay_needs_adamw():
    config = config_with({"optimizer.name": "adam", "optimizer.weight_decay": 0.01})
    message = refusal_of(config)
    assert message.startswith("config.optimizer.weight_decay=0.01: ")
    assert "config.optimizer.name=adamw" in message
    config.optimizer.name = "adamw"
    assert validate(config) is None
