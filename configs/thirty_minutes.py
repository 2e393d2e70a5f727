"""The best text of half an hour on two CPU cores.

python launch/train.py --config=thirty_minutes
"""

from ml_collections import ConfigDict

from charlstm.config import base_config


def get_config() -> ConfigDict:
    """Return a model of 1024 units, which reads a novel 20 times."""
    config = base_config()
    config.num_epochs = 20
    config.batch_size = 16
    config.seq_len = 64
    # Every second epoch of a novel.
    config.eval_every_steps = 1500
    config.checkpoint_every_steps = 500
    config.model.hidden_size = 1024
    config.model.dropout_rate = 0.5
    config.optimizer.learning_rate = 6e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.final_share = 0.4
    return config
