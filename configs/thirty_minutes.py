"""The best text that half an hour on two CPU cores has given.

python launch/train.py --config=thirty_minutes

1.773 bits per character on the last tenth of Dracula, the mean of three seeds (1.769 to 1.775), in
13 minutes for the whole command on one core of a new AMD EPYC (family 26) while another training
had the other. Two cores of an older one (family 25 model 1), which read 6,400 characters a second
with this width, should take 25.
"""

from ml_collections import ConfigDict

from charlstm.config import base_config


def get_config() -> ConfigDict:
    """Return a wide model that reads the text twelve times without learning it by heart."""
    config = base_config()
    config.num_epochs = 12
    # As in configs/ten_minutes.py.
    config.batch_size = 16
    config.seq_len = 64
    # Every second epoch of a novel.
    config.eval_every_steps = 1488
    config.model.hidden_size = 640
    config.model.dropout_rate = 0.4
    # What lets it read on: width or dropout of the outputs alone do not.
    config.model.recurrent_dropout = 0.12
    config.optimizer.learning_rate = 1e-2
    config.optimizer.final_share = 0.3
    return config
