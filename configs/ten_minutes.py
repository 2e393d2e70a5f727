"""Better text in ten minutes on two CPU cores.

python launch/train.py --config=ten_minutes

1.786 bits per character on the last tenth of Dracula, the mean of three seeds (1.782 to 1.789), in
about 400 s for the whole command on one core of a new AMD EPYC (family 26) while another training
had the other. One core of an older one (family 25) took 751 s for as many characters.
"""

from ml_collections import ConfigDict

from charlstm.config import base_config


def get_config() -> ConfigDict:
    """Return a wider model, which reads the text six times."""
    config = base_config()
    config.num_epochs = 6
    # A wide model reads more rows at once nearly for nothing, and then shorter windows are enough.
    config.batch_size = 16
    config.seq_len = 64
    # Once an epoch of a novel.
    config.eval_every_steps = 744
    config.model.hidden_size = 640
    # Without them it would learn the text by heart. The two together have 1.682 bits, 0.5 of the
    # outputs alone 1.698 (configs/trials.tsv, S108, S110).
    config.model.dropout_rate = 0.35
    config.model.recurrent_dropout = 0.08
    config.optimizer.learning_rate = 1e-2
    # The average of the weights does what a vanishing rate would do, and learns less by heart.
    config.optimizer.final_share = 0.4
    return config
