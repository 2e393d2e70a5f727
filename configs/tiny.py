"""A run of seconds, for tests and for a first look at a run folder.

python launch/train.py --config=tiny
"""

from ml_collections import ConfigDict

from charlstm.config import base_config


def get_config() -> ConfigDict:
    """Return a small model, which learns spelling but does not write well."""
    config = base_config()
    config.num_steps = 200
    config.batch_size = 8
    config.seq_len = 32
    config.eval_every_steps = 100
    config.log_every_steps = 20
    config.model.hidden_size = 64
    # A few seconds are too short to overfit.
    config.model.dropout_rate = 0.1
    config.optimizer.learning_rate = 8e-3
    config.optimizer.warmup_steps = 20
    config.sample.length = 200
    return config
