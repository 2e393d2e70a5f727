"""A wide model for half an hour on two CPU cores.

python launch/train.py --config=thirty_minutes
"""

from ml_collections import ConfigDict

from charlstm.config import base_config


def get_config() -> ConfigDict:
    """Return a model of 1024 units, which reads the text eight times with few of them at a time."""
    config = base_config()
    config.num_epochs = 8
    # As in configs/ten_minutes.py.
    config.batch_size = 16
    config.seq_len = 64
    config.eval_every_steps = 744
    config.model.hidden_size = 1024
    config.model.dropout_rate = 0.6
    config.optimizer.learning_rate = 8e-3
    config.optimizer.final_share = 0.4
    return config
