"""A wide model for a TPU pod: bfloat16 products, float32 state and loss.

It was compiled for TPUs, and has not run on one.

python launch/train.py --config=tpu --config.data.path=FOLDER

To compile it without a TPU, and to compute its time on other chips:

python launch/plan.py --config=tpu --compile=v5e:4x4
python launch/plan.py --config=tpu --chips=v6e:16 --seconds=0
"""

from ml_collections import ConfigDict

from charlstm.config import base_config


def get_config() -> ConfigDict:
    """Return settings for 16 v5e chips; scale batch_size with the number of chips."""
    config = base_config()
    # 256 rows per chip: 4.6 of a v5e's 16.9 GB as compiled, of which 1,024 rows take 13.8. Fewer
    # rows make a step shorter, down to 16 rows per chip, where the overhead of the loops dominates.
    config.batch_size = 4096
    # A power of two, for any chunk size. Longer windows cost memory and time, and gain little.
    config.seq_len = 128
    # An evaluation reads at most two million characters, four batches of this size.
    config.eval_every_steps = 1000
    # Cloud machines are preempted with little notice.
    config.checkpoint_every_steps = 250

    # Multiples of 256 fill the matrix units (128 lanes, 256 from v6e on).
    config.model.hidden_size = 2048
    config.model.num_layers = 2
    # Parameters, optimizer, cell state and loss stay float32.
    config.model.dtype = "bfloat16"
    # A text large enough for a pod is read once or twice, too rarely to be memorized.
    config.model.dropout_rate = 0.0

    # Below the rule of charlstm/planning/rules.py, which was fitted to at most 1024 units.
    config.optimizer.learning_rate = 1e-3
    # Wide models diverge at the full rate at the start.
    config.optimizer.warmup_steps = 1000
    return config
