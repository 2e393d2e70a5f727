"""Configs of small runs, and what several test modules do to a run."""

from ml_collections import ConfigDict

from charlstm.config import base_config

NUM_STEPS = 30


def small_config(book_path, **changes):
    config = base_config()
    settings = {
        "data.path": str(book_path),
        "num_steps": NUM_STEPS,
        "batch_size": 4,
        "seq_len": 16,
        "eval_every_steps": 10,
        "log_every_steps": 4,
        "model.hidden_size": 16,
        "optimizer.warmup_steps": 4,
        # The same program for any number of steps, which is compiled once.
        "optimizer.schedule": "constant",
        "sample.length": 30,
        "mesh.data": 1,
    }
    config.update_from_flattened_dict(settings | changes)
    return config


def stop_after(num_calls):
    """Return a should_stop that becomes true after so many calls of train_steps."""
    calls = iter(range(1, 10**6))
    return lambda: next(calls) >= num_calls


def flip(path, place):
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    bit = place % (8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def config_with(changes: dict) -> ConfigDict:
    # Not by assignment, at which a ConfigDict refuses or converts most wrong types by itself.
    sections = base_config().to_dict()
    for key, value in changes.items():
        *section, name = key.split(".")
        (sections.setdefault(section[0], {}) if section else sections)[name] = value
    return ConfigDict(sections)
