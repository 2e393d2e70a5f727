"""A wide model for a TPU pod: bfloat16 products, float32 state and loss. Not yet run on a TPU.

python launch/train.py --config=tpu --config.data.path=FOLDER

Only a shortened form was run, in bfloat16 on eight virtual devices of a CPU, where it gave the
losses of one device (tests/test_scaling.py). What it should take is on paper only:

python launch/plan.py --config=tpu --chips=v5e:16 --seconds=0
"""

from ml_collections import ConfigDict

from charlstm.config import base_config


def get_config() -> ConfigDict:
    """Return settings for 16 chips of a v5e, and for more with batch_size raised as they are."""
    config = base_config()
    # 256 rows for each of 16 chips. A chip reads the recurrent kernel again at every time step, so
    # that with fewer it mostly waits for its memory, and 16 GB hold no more than 500 (v5e, by
    # charlstm/planning/cost.py).
    config.batch_size = 4096
    # A power of two divides into chunks of any; a longer window costs memory and time in
    # proportion, and gains little, since the carry reaches further.
    config.seq_len = 128
    # An evaluation reads at most two million characters, four batches of this size.
    config.eval_every_steps = 1000
    # Machines in the cloud are taken away without much notice.
    config.checkpoint_every_steps = 250

    # Widths in multiples of 256 fill the matrix units (128 lanes, 256 from v6e on).
    config.model.hidden_size = 2048
    config.model.num_layers = 2
    # Parameters, optimizer, cell state and loss stay float32.
    config.model.dtype = "bfloat16"
    # A text that fills a pod is read once or twice: too little to be memorised.
    config.model.dropout_rate = 0.0

    # Lower than charlstm/planning/rules.py's, which was found up to 1024 units and for short runs.
    config.optimizer.learning_rate = 1e-3
    # A wide model diverges at a full rate from the start.
    config.optimizer.warmup_steps = 1000
    return config
