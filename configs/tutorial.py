"""An exact copy of the Keras tutorial 'Text Generation With LSTM Recurrent Neural Networks'.

python launch/train.py --config=tutorial
"""

from ml_collections import ConfigDict

from charlstm.config import base_config


def get_config() -> ConfigDict:
    """Return the settings of the tutorial."""
    config = base_config()
    config.num_epochs = 20
    config.batch_size = 128
    # Once per epoch, like its ModelCheckpoint. An epoch takes half an hour on two cores, hence
    # checkpoints in between.
    config.eval_every_steps = 0
    config.checkpoint_every_steps = 500

    config.data.lowercase = True
    # The tutorial trains on the whole text, and the training loss decides which step is best.
    config.data.val_fraction = 0.0
    config.data.order = "windows"
    config.data.loss_on = "last"

    config.model.input = "scaled"
    config.model.hidden_size = 256
    config.model.dropout_rate = 0.2
    config.model.variational_dropout = False
    config.model.multiplicative = False
    config.model.recurrent_rms_norm = False

    # Keras's defaults for Adam.
    config.optimizer.name = "keras_adam"
    config.optimizer.weight_decay = 0.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.b2 = 0.999
    config.optimizer.average_window = 0.0
    config.optimizer.epsilon = 1e-7
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 0
    config.optimizer.clip_norm = 0.0

    config.sample.length = 1000
    config.sample.temperature = 0.0
    config.sample.method = "window"
    return config
