"""A wide model for one accelerator with 16 GB or more. It was not run on one.

python launch/train.py --config=gpu --config.data.path=FOLDER

For texts of tens of megabytes; it overfits smaller ones, for which --config=medium is better. To
estimate its time and memory:

python launch/plan.py --config=gpu
"""

from ml_collections import ConfigDict

from charlstm.config import base_config


def get_config() -> ConfigDict:
    """Return settings whose products fill the matrix units of one chip."""
    config = base_config()
    # Each time step reads the recurrent kernel; with fewer rows memory bandwidth is the limit.
    config.batch_size = 256
    config.seq_len = 128
    config.eval_every_steps = 1000
    config.checkpoint_every_steps = 1000

    # Parameters, optimizer, cell state and loss stay float32.
    config.model.dtype = "bfloat16"
    config.model.hidden_size = 2048
    config.model.dropout_rate = 0.2

    # Lower than charlstm/planning/rules.py's, which was found up to 1024 units and for short runs.
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 500
    return config
