"""A wide model for one accelerator with at least 4 GB: compiled for an H100, not run on one.

python launch/train.py --config=gpu --config.data.path=FOLDER

For texts of tens of megabytes. It overfits smaller texts; use --config=medium for them. To estimate
time and memory, and to compile it without a GPU:

python launch/plan.py --config=gpu
python launch/plan.py --config=gpu --compile=h100:1
"""

from ml_collections import ConfigDict

from charlstm.config import base_config


def get_config() -> ConfigDict:
    """Return settings whose matrix products are large enough for one chip."""
    config = base_config()
    # Each time step reads the recurrent kernel; with fewer rows memory bandwidth limits the speed.
    config.batch_size = 256
    config.seq_len = 128
    config.eval_every_steps = 1000
    config.checkpoint_every_steps = 1000

    # Parameters, optimizer, cell state and loss stay float32.
    config.model.dtype = "bfloat16"
    config.model.hidden_size = 2048
    config.model.dropout_rate = 0.2

    # Below the rule of charlstm/planning/rules.py, which was fitted to at most 1024 units.
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 500
    return config
