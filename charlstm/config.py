"""All settings of a run and their defaults: the recipe behind the published results."""

from typing import Any

from ml_collections import ConfigDict


def base_config() -> ConfigDict:
    """Return the default recipe, the only place with defaults of settings."""
    config = ConfigDict()
    # Seed of initial weights, order of windows, state resets, dropout and samples.
    config.seed = 0
    # Length of training in passes over the training text.
    config.num_epochs = 4
    # Length of training in steps; 0: use num_epochs.
    config.num_steps = 0
    # Rows of a batch. Few rows give many updates per minute on a CPU.
    config.batch_size = 8
    # Characters of a window. Gradients stop at its beginning; the carry does not.
    config.seq_len = 100
    # Steps between evaluations, each with a sample; 0: once per epoch.
    config.eval_every_steps = 500
    # End the training after this many evaluations without a lower validation loss, even if the
    # learning rate has not decayed to its end; 0: never.
    config.patience = 0
    # Steps between checkpoints, in addition to those of evaluations; 0: none.
    config.checkpoint_every_steps = 0
    # Steps between records in metrics.jsonl and TensorBoard.
    config.log_every_steps = 50
    # A trained run, or an exported file, whose best weights this run starts from; empty: random
    # weights. The model must be the same; the text may be another (fine-tuning).
    config.init_from = ""
    config.data = _data()
    config.model = _model()
    config.optimizer = _optimizer()
    config.sample = _sample()
    config.mesh = _mesh()
    return config


def _data() -> ConfigDict:
    data = ConfigDict()
    # A file, a folder (.txt, .gz, .zst, .bz2, .xz in it), a pattern, or pydoc_data.topics, the
    # manual that Python carries; empty: Dracula.
    data.path = ""
    # Convert to lower case.
    data.lowercase = False
    # Remove punctuation and symbols.
    data.strip_punctuation = False
    # Replace characters that occur less often by U+FFFD; 1: keep all.
    data.min_count = 1
    # Separator of documents within a file; every file also ends one. Empty: one long text.
    data.document_separator = ""
    # Share of the text, at its end, that is held out for validation.
    data.val_fraction = 0.1
    # Upper limit of held-out characters, because evaluations take time; 0: no limit.
    data.max_val_chars = 2_000_000
    # streams: text in order, stateful; windows: all positions, shuffled, stateless.
    data.order = "streams"
    # Probability of resetting the state of a row in streams; trains the model for prompts.
    data.state_reset_prob = 0.05
    # all: a loss at every time step; last: at the last time step of a window.
    data.loss_on = "all"
    return data


def _model() -> ConfigDict:
    model = ConfigDict()
    # fused: hand-written gradient; native: the same in C++, for float32 on one CPU device; auto:
    # native if it can run, else fused; flax: the scanned Flax cell, slower; cudnn: NVIDIA GPUs.
    model.recurrence = "auto"
    # Hidden units of a layer.
    model.hidden_size = 384
    # LSTM layers.
    model.num_layers = 1
    # Dropout of the output of every layer; a single book overfits without it.
    model.dropout_rate = 0.25
    # One dropout mask per window (Gal and Ghahramani 2016), not one per time step.
    model.variational_dropout = True
    # Dropout of the hidden state that the gates read, one mask per row and window.
    # It helps from about six epochs on.
    model.recurrent_dropout = 0.0
    # Scale the hidden state by the input before the gates, as a multiplicative LSTM does.
    model.multiplicative = True
    # Divide the recurrent product of the four gates by its root mean square.
    model.recurrent_rms_norm = True
    # Added to the mean square. Small values amplify rounding errors after a zero state.
    model.norm_epsilon = 0.1
    # one_hot: unit vectors; embed: learned vectors; scaled: id / V, as in the Keras tutorial.
    model.input = "one_hot"
    # Length of a learned vector, for model.input=embed.
    model.embed_size = 64
    # Use the learned vectors as output weights, for vocabularies of thousands of characters.
    model.tie_embeddings = False
    # Type of the products: float32 or bfloat16. Parameters and cell state stay float32. On
    # accelerators JAX rounds the operands of float32 products: charlstm/parallel/README.md.
    model.dtype = "float32"
    return model


def _optimizer() -> ConfigDict:
    optimizer = ConfigDict()
    # adam, adamw, cautious_adamw (no update against the gradient), or keras_adam
    # (epsilon where Keras has it).
    optimizer.name = "cautious_adamw"
    # Peak learning rate, after the warm-up.
    optimizer.learning_rate = 1.2e-2
    # Decay after the warm-up: constant, cosine or linear.
    optimizer.schedule = "linear"
    # Final learning rate as a share of the peak. At 0, many epochs overfit more.
    optimizer.end_lr_ratio = 0.2
    # Steps of linear warm-up, because Adam's first estimates rest on few gradients.
    optimizer.warmup_steps = 100
    # Decoupled weight decay, for adamw and cautious_adamw.
    optimizer.weight_decay = 0.05
    # Maximum global norm of the gradient; 0: no clipping.
    optimizer.clip_norm = 1.0
    # Decay of Adam's second moment.
    optimizer.b2 = 0.99
    # Polyak average: evaluate and sample with the mean of the weights over about this share of
    # the steps so far; 0: use the last weights.
    optimizer.average_window = 0.1
    # Adam's epsilon.
    optimizer.epsilon = 1e-8
    return optimizer


def _sample() -> ConfigDict:
    sample = ConfigDict()
    # Characters of a sample; the settings here are also the defaults of launch/sample.py.
    sample.length = 400
    # Divides the logits; 0: take the most probable character.
    sample.temperature = 0.8
    # Sample from the k most probable characters; 0: all.
    sample.top_k = 0
    # Sample from the smallest set of characters with this probability; 1: all.
    sample.top_p = 1.0
    # Drop characters below this share of the highest probability; 0: none.
    sample.min_p = 0.0
    # Subtracted from the logit of a character that continues a repetition of repetition_length
    # characters, and more for a longer one; 1 ends loops; 0: none.
    sample.repetition_penalty = 0.0
    # Characters that may be repeated without a penalty; 20 concern 0.5 % of Dracula's predictions.
    sample.repetition_length = 20
    # carry: one step per character; window: step_window seq_len characters for each.
    sample.method = "carry"
    return sample


def _mesh() -> ConfigDict:
    mesh = ConfigDict()
    # Number of devices that share the rows of a batch; -1: all.
    mesh.data = -1
    return mesh


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Return the settings of `config` as one flat dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{key}.{name}": inner for name, inner in flatten(value).items()}
        else:
            flat[key] = value
    return flat
