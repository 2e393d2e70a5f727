"""A wide model for one accelerator with 16 GB or more. Not yet run on one.

python launch/train.py --config=gpu --config.data.path=FOLDER

For texts of tens of megabytes; what is smaller is learnt by heart, and better served by
configs/ten_minutes.py. What it takes can be asked before:

python launch/plan.py --config=gpu
"""

from ml_collections import ConfigDict

from charlstm.config import base_config


def get_config() -> ConfigDict:
    """Return settings whose products fill the matrix units of one chip."""
    config = base_config()
    # A chip waits for its memory where fewer rows share what it reads of the recurrent kernel at
    # each time step: from about 256 on it computes.
    config.batch_size = 256
    config.seq_len = 128
    config.eval_every_steps = 1000
    config.checkpoint_every_steps = 1000

    # Parameters, optimizer, cell state and loss stay float32.
    config.model.dtype = "bfloat16"
    config.model.hidden_size = 2048
    config.model.dropout_rate = 0.2

    # Lower than launch/plan_rule.py's, which was found up to 1024 units and for short runs.
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 500
    return config
