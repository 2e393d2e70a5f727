import importlib.util
import inspect
import math
from pathlib import Path

import pytest
from helpers import config_with
from ml_collections import ConfigDict

import charlstm.config as config_module
from charlstm.config import base_config, flatten
from charlstm.config_check import check_key, check_setting, validate
from charlstm.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CONFIG_FILES = sorted((ROOT / "configs").glob("*.py"))


def refusal_of(config: ConfigDict) -> str:
    with pytest.raises(UserError) as error:
        validate(config)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_every_file_in_configs_is_valid(path):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    validate(config)
    assert flatten(config).keys() == flatten(base_config()).keys()
    # A launcher that changes its config must not change the next one.
    config.seed += 1
    assert module.get_config().seed != config.seed


def test_configs_holds_the_three_recipes():
    # Otherwise the test above could pass by reading none.
    assert {"default", "tiny", "tutorial"} <= {path.stem for path in CONFIG_FILES}


def test_base_config_is_a_fresh_object_each_time():
    config = base_config()
    config.batch_size += 1
    config.model.hidden_size += 1
    assert base_config() is not config
    assert base_config().batch_size == config.batch_size - 1
    assert base_config().model.hidden_size == config.model.hidden_size - 1


def test_flatten_gives_dotted_keys():
    config = ConfigDict({"a": 1, "b": {"c": "x", "d": {"e": 2.0}}})
    assert flatten(config) == {"a": 1, "b.c": "x", "b.d.e": 2.0}


NAN, INF = math.nan, math.inf
SENSELESS = {
    "seed": [-1, 2**32],
    "num_epochs": [0, -1],
    "num_steps": [-1],
    "batch_size": [0, -1],
    "seq_len": [0, -100],
    "eval_every_steps": [-1],
    "checkpoint_every_steps": [-1],
    "log_every_steps": [0, -1],
    "data.val_fraction": [1.0, 1.5, -0.1, NAN, INF],
    "data.order": ["", "stream", "Streams"],
    "data.state_reset_prob": [-0.1, 1.0, NAN, INF],
    "data.loss_on": ["", "first", "ALL"],
    "model.recurrence": ["", "scan", "cuda"],
    "model.hidden_size": [0, -256],
    "model.num_layers": [0, -1],
    "model.dropout_rate": [1.0, 1.5, -0.1, NAN, INF],
    "model.recurrent_dropout": [1.0, -0.1, NAN, INF],
    "model.input": ["", "onehot"],
    "model.embed_size": [0, -1],
    "model.norm_epsilon": [0.0, -0.1, NAN, INF],
    "model.dtype": ["", "float16", "float64", "int8"],
    "optimizer.name": ["", "sgd", "Adam"],
    "optimizer.learning_rate": [0.0, -1e-3, NAN, INF, -INF],
    "optimizer.schedule": ["", "step", "Cosine"],
    "optimizer.end_lr_ratio": [-0.1, 1.5, NAN, INF],
    "optimizer.warmup_steps": [-1],
    "optimizer.weight_decay": [-0.1, NAN, INF],
    "optimizer.clip_norm": [-1.0, NAN, INF],
    "optimizer.b2": [-0.1, 1.0, NAN, INF],
    "optimizer.average_window": [-0.1, 1.0, NAN, INF],
    "optimizer.epsilon": [0.0, -1e-8, NAN, INF],
    "sample.length": [0, -1],
    "sample.temperature": [-0.1, NAN, INF],
    "sample.top_k": [-1],
    "sample.top_p": [0.0, -0.5, 1.1, NAN, INF],
    "sample.method": ["", "beam", "Carry"],
    "data.min_count": [0, -1],
    "data.max_val_chars": [-1],
    "mesh.data": [0, -2, 2**31],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in SENSELESS.items() for value in values]
)
def test_a_senseless_value_is_refused_by_name(key, value):
    message = refusal_of(config_with({key: value}))
    assert message.startswith(f"config.{key}={value}: must be ")
    # The launchers ask for one setting at a time.
    with pytest.raises(UserError) as error:
        check_setting(key, value)
    assert str(error.value) == message


def test_a_number_too_large_for_a_float_is_a_number_like_others():
    assert refusal_of(config_with({"batch_size": -(10**400)})).startswith("config.batch_size=-1000")


def test_every_setting_but_the_path_and_the_switches_has_senseless_values():
    free = {"data.path", "data.lowercase", "data.strip_punctuation", "data.document_separator"}
    free |= {"model.variational_dropout", "model.multiplicative", "model.recurrent_rms_norm"}
    free.add("model.tie_embeddings")
    assert SENSELESS.keys() | free == flatten(base_config()).keys()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 0),
        ("seed", 2**32 - 1),
        ("num_epochs", 1),
        ("batch_size", 1),
        ("seq_len", 1),
        ("eval_every_steps", 0),
        ("log_every_steps", 1),
        ("data.path", "anything at all"),
        ("data.lowercase", True),
        ("data.val_fraction", 0.0),
        ("data.val_fraction", 0.999),
        ("data.order", "windows"),
        ("model.recurrence", "flax"),
        ("model.hidden_size", 1),
        ("model.dropout_rate", 0.0),
        ("model.dropout_rate", 0.99),
        ("model.input", "scaled"),
        ("model.input", "embed"),
        ("model.dtype", "bfloat16"),
        ("optimizer.name", "adamw"),
        ("optimizer.name", "cautious_adamw"),
        ("optimizer.schedule", "linear"),
        ("optimizer.schedule", "constant"),
        ("optimizer.warmup_steps", 0),
        ("optimizer.clip_norm", 0.0),
        ("sample.temperature", 0.0),
        ("sample.top_k", 1_000_000),
        ("sample.top_p", 1.0),
        ("sample.top_p", 0.01),
        ("sample.method", "window"),
    ],
)
def test_the_last_values_that_make_sense_are_accepted(key, value):
    config = config_with({key: value})
    assert flatten(config)[key] == value
    assert validate(config) is None


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("batch_size", 16.0, "int"),
        ("batch_size", "16", "int"),
        ("batch_size", True, "int"),
        ("seed", None, "int"),
        ("seq_len", NAN, "int"),
        ("data.lowercase", 1, "bool"),
        ("data.lowercase", "true", "bool"),
        ("data.path", 7, "str"),
        ("data.path", None, "str"),
        ("data.order", ("streams",), "str"),
        ("data.val_fraction", 0, "float"),
        ("model.dropout_rate", "0.1", "float"),
        ("model.dropout_rate", False, "float"),
        ("model.dtype", float, "str"),
        ("optimizer.learning_rate", 1, "float"),
        ("sample.top_k", 5.0, "int"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(key, value, wanted):
    message = refusal_of(config_with({key: value}))
    assert message == f"config.{key}={value!r}: must be of type {wanted}"


@pytest.mark.parametrize("key", list(flatten(base_config())))
def test_a_missing_key_is_refused_by_name(key):
    config = base_config()
    *section, name = key.split(".")
    del (config[section[0]] if section else config)[name]
    assert f"config.{key}: missing" in refusal_of(config)


@pytest.mark.parametrize("section", ["data", "model", "optimizer", "sample"])
def test_a_missing_section_is_refused_by_name(section):
    config = base_config()
    del config[section]
    assert f"config.{section}." in refusal_of(config)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("batchsize", "batch_size"),
        ("batch_sise", "batch_size"),
        ("seqlen", "seq_len"),
        ("hidden_size", "model.hidden_size"),
        ("learning_rate", "optimizer.learning_rate"),
        ("model.hiden_size", "model.hidden_size"),
        ("data.lower_case", "data.lowercase"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
        ("sample.temprature", "sample.temperature"),
        # Too short to be near the dotted form.
        ("top_k", "sample.top_k"),
        ("ordr", "data.order"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(key, nearest):
    with pytest.raises(UserError) as error:
        check_key(key)
    assert str(error.value) == f"config.{key}: no such key; did you mean {nearest}?"
    assert refusal_of(config_with({key: 1})) == str(error.value)


def test_an_unknown_key_near_none_is_refused_with_all_keys():
    with pytest.raises(UserError) as error:
        check_key("xyzzy")
    assert all(key in str(error.value) for key in flatten(base_config()))


@pytest.mark.parametrize("key", list(flatten(base_config())))
def test_every_key_is_a_key(key):
    assert check_key(key) is None


def test_a_number_in_place_of_a_section_is_refused():
    assert refusal_of(config_with({"model": 256})).startswith("config.model: ")


def test_streams_learn_from_every_character():
    config = config_with({"data.order": "streams", "data.loss_on": "last"})
    message = refusal_of(config)
    assert message.startswith("config.data.loss_on=last: ")
    assert "config.data.order=windows" in message
    config.data.order = "windows"
    assert validate(config) is None


def test_cudnn_takes_float32_only():
    config = config_with({"model.recurrence": "cudnn", "model.dtype": "bfloat16"})
    assert refusal_of(config).startswith("config.model.dtype=bfloat16: ")


def test_cudnn_has_the_plain_layer_only():
    config = config_with({"model.recurrence": "cudnn", "model.recurrent_dropout": 0.1})
    for key, none in (
        ("multiplicative", False),
        ("recurrent_rms_norm", False),
        ("recurrent_dropout", 0.0),
    ):
        message = refusal_of(config)
        assert message.startswith(f"config.model.{key}={config.model[key]}: ")
        assert message.endswith(f"config.model.{key}={none}")
        config.model[key] = none
    assert validate(config) is None


def test_weight_decay_needs_adamw():
    config = config_with({"optimizer.name": "adam", "optimizer.weight_decay": 0.01})
    message = refusal_of(config)
    assert message.startswith("config.optimizer.weight_decay=0.01: ")
    assert "config.optimizer.name=adamw" in message
    config.optimizer.name = "adamw"
    assert validate(config) is None


@pytest.mark.parametrize("key", list(flatten(base_config())))
def test_every_setting_has_a_comment_above_it_that_says_why(key):
    section, _, name = key.rpartition(".")
    assignment = f"    {section or 'config'}.{name} = "
    lines = inspect.getsource(config_module).splitlines()
    (number,) = (index for index, line in enumerate(lines) if line.startswith(assignment))
    assert lines[number - 1].startswith("    # ")
