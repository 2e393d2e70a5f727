"""Parameters, operations and memory of a model by formula.

All functions compute with a config and V, the number of characters, and allocate no array. Sizes:
B = batch_size, T = seq_len, H = hidden_size, N = num_layers, E the size of a layer's input, P the
number of parameters. A product of [a, b] and [b, c] is 2abc operations.

                      parameters         operations per character
    layer             4H (E + H + 1)     8H (E + H)
    multiplicative    H E                2H E
    recurrent norm    4H
    dense             H V + V            2H V
    tied output       H E + E + V        2H E + 2E V       (the embedding has V E parameters)

On a CPU, one-hot input is a row lookup, which saves 8H E. On accelerators its gradient is a product
of 8H V. Training takes three times the operations of the forward pass, because the gradient of a
product is two products (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
"""

from ml_collections import ConfigDict

FLOAT = 4  # bytes; parameters, gradients, Adam's moments and the carry are float32


def input_sizes(config: ConfigDict, vocab_size: int) -> list[int]:
    """Return E of each layer."""
    model = config.model
    first = {"one_hot": vocab_size, "embed": model.embed_size, "scaled": 1}[model.input]
    return [first] + [model.hidden_size] * (model.num_layers - 1)


def count_params(config: ConfigDict, vocab_size: int) -> int:
    """Return P."""
    model, hidden_size = config.model, config.model.hidden_size
    layers = sum(
        hidden_size
        * (_num_input_kernels(config) * size + 4 * hidden_size + 4 + 4 * model.recurrent_rms_norm)
        for size in input_sizes(config, vocab_size)
    )
    embed = vocab_size * model.embed_size if model.input == "embed" else 0
    to_embedding = (hidden_size + 1) * model.embed_size
    output = to_embedding if model.tie_embeddings else hidden_size * vocab_size
    return layers + embed + output + vocab_size


def flops_per_char(config: ConfigDict, vocab_size: int) -> int:
    """Return the operations of all matrix products of the forward pass, per character.

    Training takes three times as many. Other operations, which are not counted, are a few percent
    from H = 128 on, but a larger part of the time.
    """
    return scan_flops(config) + other_flops(config, vocab_size)


def scan_flops(config: ConfigDict) -> int:
    """Return the part of flops_per_char inside the loops over time, for all layers."""
    return 8 * config.model.hidden_size**2 * config.model.num_layers


def other_flops(config: ConfigDict, vocab_size: int) -> int:
    """Return the part of flops_per_char that is computed for all time steps at once."""
    model, sizes = config.model, input_sizes(config, vocab_size)
    dense_sizes = sizes[1:] if model.input == "one_hot" else sizes
    tied = 2 * model.embed_size * (model.hidden_size + vocab_size)
    output = tied if model.tie_embeddings else 2 * model.hidden_size * vocab_size
    return 2 * _num_input_kernels(config) * model.hidden_size * sum(dense_sizes) + output


def _num_input_kernels(config: ConfigDict) -> int:
    """Return the number of kernels [E, H] of a layer: four gates, and the multiplicative scale."""
    return 4 + config.model.multiplicative


def residual_bytes(config: ConfigDict) -> int:
    """Return the bytes that lstm.fused keeps for the backward pass.

    They are per row, time step, layer and hidden unit. Of float32: h, six local derivatives and,
    with recurrent norm, four normalised products. Of bfloat16: h, c before the time step, and four
    sums or normalised products, from which the backward pass computes the derivatives.
    """
    if config.model.dtype == "bfloat16":
        return 2 * 6
    return FLOAT * (7 + 4 * config.model.recurrent_rms_norm)


def activation_bytes(config: ConfigDict, vocab_size: int, batch_size: int | None = None) -> int:
    """Return the bytes of activations and their gradients in a training step on a CPU.

    Floats per character and layer, times H: the residuals; 1 with recurrent norm, which XLA adds; 1
    for h before each step; 2 for the output and its gradient; 2 for a dropout mask drawn at each
    step. Dense input adds 4 for the gates, and 2 if multiplicative, and the same once more for the
    gradient of one layer. Logits add 2.75 V. XLA's own count on a CPU agrees within 1/8 from B T H
    = 1.6 million on. Below that it is higher, because copies of the parameters count.

    Args:
      config: the settings.
      vocab_size: V.
      batch_size: rows, by default config.batch_size.
    """
    model = config.model
    num_dense = model.num_layers - (model.input == "one_hot")  # layers with dense input
    per_layer = residual_bytes(config) / FLOAT + model.recurrent_rms_norm + 3
    per_layer += 2 if model.dropout_rate and not model.variational_dropout else 0
    per_dense = 6 if model.multiplicative else 4
    floats = model.hidden_size * (
        per_layer * model.num_layers + per_dense * (num_dense + (num_dense > 0))
    )
    rows = config.batch_size if batch_size is None else batch_size
    return int(FLOAT * rows * config.seq_len * (floats + 2.75 * vocab_size))


def state_bytes(config: ConfigDict, vocab_size: int) -> int:
    """Return the bytes of parameters, optimizer state, carry, counters and key.

    A checkpoint contains these arrays and Orbax's metadata.
    """
    carry = 2 * config.batch_size * config.model.hidden_size * config.model.num_layers
    has_average = config.optimizer.average_window > 0
    counters = 2 + has_average + 1 + 2  # Adam's, the schedule's, the average's, the step, the key
    others = FLOAT * (count_params(config, vocab_size) + carry + counters)
    return others + optimizer_bytes(config, vocab_size)


def optimizer_bytes(config: ConfigDict, vocab_size: int) -> int:
    """Return the bytes of Adam's two moments and of the average of the parameters, if any."""
    copies = 2 + (config.optimizer.average_window > 0)
    return FLOAT * copies * count_params(config, vocab_size)


def gradient_bytes(config: ConfigDict, vocab_size: int) -> int:
    """Return the bytes of a gradient, which an all-reduce sums."""
    return FLOAT * count_params(config, vocab_size)


def device_bytes(config: ConfigDict, vocab_size: int, num_devices: int) -> int:
    """Return the bytes of a step on each of `num_devices` devices of a CPU."""
    rows = -(-config.batch_size // num_devices)
    replicated = state_bytes(config, vocab_size) + gradient_bytes(config, vocab_size)
    return replicated + activation_bytes(config, vocab_size, rows)
