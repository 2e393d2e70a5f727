"""Parameters, operations, memory and step time of a model by formula.

All functions compute with a config and V, the number of characters, and allocate no array. Sizes:
B = batch_size, T = seq_len, H = hidden_size, N = num_layers, E the size of a layer's input, P the
number of parameters, n the number of chips. A product of [a, b] and [b, c] is 2abc operations.

                      parameters         operations per character
    layer             4H (E + H + 1)     8H (E + H)
    multiplicative    H E                2H E
    recurrent norm    4H
    dense             H V + V            2H V
    tied output       H E + E + V        2H E + 2E V       (the embedding has V E parameters)

On a CPU, one-hot input is a row lookup, which saves 8H E. On accelerators its gradient is a product
of 8H V. Training takes three times the operations of the forward pass, because the gradient of a
product is two products (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).

The time of a step on n chips is a sum of parts that wait for each other. In the loop over time of a
layer, each of T steps waits for the one before, forward and backward, and takes the longest of:

    latency     the overhead of a loop iteration
    products    8 H^2 b / F            for b = B / n rows at F operations per second
    memory      (8 H^2 + 28 H b) / M   at M bytes per second: the recurrent kernel [H, 4H] in two
                                       bytes each, and seven floats per row and hidden unit (the
                                       roofline of Williams, Waterman and Patterson 2009)

A chip reads the kernel at every time step. Below b = F / M rows, 240 on a v5e, and somewhat above,
memory is the limit. Outside the loops are the products of all time steps at once, Adam's update and
one all-reduce of P gradients. On a ring of n chips that send W bytes per second, an all-reduce
takes 2 (n - 1) / n times the bytes over W (Patarasuk and Yuan 2009, 'Bandwidth optimal all-reduce
algorithms for clusters of workstations'). On a torus with `axes` axes it also takes axes n^(1/axes)
hops of 1 us, half the length of each axis twice ('How to Scale Your Model', Austin et al. 2025,
https://jax-ml.github.io/scaling-book/sharding). Chips beyond one pod add up the sums of their pods
over the network.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from charlstm.errors import UserError

FLOAT = 4  # bytes; parameters, gradients, Adam's moments and the carry are float32
HOP_SECONDS = 1e-6
GIB = 2**30


class Chip(NamedTuple):
    """The data sheet of an accelerator, per chip, in bytes, operations and seconds."""

    name: str
    flops: float  # of bfloat16 products
    memory: float  # bytes that a program may use; of TPUs as the compiler of libtpu 0.0.52 says
    memory_bandwidth: float
    link_bandwidth: float  # sent over all links, half of the 'bidirectional' bandwidth
    axes: int  # of the torus; 1 for a switch
    pod_size: int  # chips that are joined by links
    network_bandwidth: float  # between pods
    loop_seconds: float  # overhead of a loop iteration; assumed, not measured
    source: str


_TPU = "https://docs.cloud.google.com/tpu/docs/"
_LINKS = "https://jax-ml.github.io/scaling-book/tpus"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4", 275e12, 30.75 * GIB, 1.2e12, 2.7e11, 3, 4096, 6.25e9, 5e-6, f"{_TPU}v4, {_LINKS}"
        ),
        Chip("v5e", 197e12, 15.75 * GIB, 819e9, 2e11, 2, 256, 3.1e9, 5e-6, f"{_TPU}v5e"),
        Chip("v5p", 459e12, 95.73 * GIB, 2.765e12, 6e11, 3, 8960, 6.25e9, 5e-6, f"{_TPU}v5p"),
        Chip("v6e", 918e12, 31.24 * GIB, 1.638e12, 4e11, 2, 256, 12.5e9, 5e-6, f"{_TPU}v6e"),
        Chip(
            *("h100", 989e12, 80e9, 3.35e12, 4.5e11, 1, 8, 5e10, 20e-6),
            source="https://jax-ml.github.io/scaling-book/gpus (SXM; 8 a node)",
        ),
    )
}


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


def activation_bytes(config: ConfigDict, vocab_size: int, batch_size: int | None = None) -> int:
    """Return the bytes of activations and their gradients in a training step.

    Floats per character and layer, times H: 7 residuals of lstm.fused; 5 more with recurrent norm
    (4 residuals, and one that XLA adds); 1 for h before each step; 2 for the output and its
    gradient; 2 for a dropout mask drawn at each step. Dense input adds 4 for the gates, and 2 if
    multiplicative, and the same once more for the gradient of one layer. Logits add 2.75 V. XLA's
    own count on a CPU agrees within 1/8 from B T H = 1.6 million on. Below that it is higher,
    because copies of the parameters count.

    Args:
      config: the settings.
      vocab_size: V.
      batch_size: rows, by default config.batch_size.
    """
    model = config.model
    num_dense = model.num_layers - (model.input == "one_hot")  # layers with dense input
    per_layer = 12 if model.dropout_rate and not model.variational_dropout else 10
    per_layer += 5 * model.recurrent_rms_norm
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


class StepTime(NamedTuple):
    """Seconds of a training step on a pod, by what they are spent on."""

    # In the loops over time these three overlap, so that only the longest counts.
    latency: float
    products: float
    memory: float
    # These follow one another.
    outside: float  # products outside the loops
    update: float
    all_reduce: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return max(self[:3]) + sum(self[3:])

    @property
    def limit(self) -> str:
        """The name of the part that takes longest."""
        return max(self._fields, key=lambda name: getattr(self, name))


def step_time(config: ConfigDict, vocab_size: int, chip: Chip, num_chips: int) -> StepTime:
    """Return the time of a step on `num_chips` chips that share the batch.

    It is a lower bound: products run at peak rate, nothing is padded to the lanes of a TPU, and
    elementwise operations outside the loops are not counted. The all-reduce starts after the whole
    gradient.
    """
    rows = config.batch_size / num_chips
    hidden_size, num_layers = config.model.hidden_size, config.model.num_layers
    width = 2 if config.model.dtype == "bfloat16" else FLOAT
    kernel_bytes = 4 * hidden_size**2 * width
    row_bytes = 7 * FLOAT * hidden_size * rows
    iterations = 2 * config.seq_len * num_layers
    # The gradients of the recurrent kernels, and all products that wait for no time step.
    lookup = 8 * hidden_size * vocab_size if config.model.input == "one_hot" else 0
    flops = scan_flops(config) + 3 * other_flops(config, vocab_size) + lookup
    grad_bytes = gradient_bytes(config, vocab_size)
    return StepTime(
        latency=iterations * chip.loop_seconds,
        products=iterations * 8 * hidden_size**2 * rows / chip.flops,
        memory=iterations * (kernel_bytes + row_bytes) / chip.memory_bandwidth,
        outside=flops * rows * config.seq_len / chip.flops,
        # Adam reads parameters, gradient and two moments, and writes all except the gradient.
        update=7 * grad_bytes / chip.memory_bandwidth,
        all_reduce=all_reduce_seconds(grad_bytes, chip, num_chips),
    )


def all_reduce_seconds(num_bytes: float, chip: Chip, num_chips: int) -> float:
    """Return the seconds of an all-reduce of `num_bytes` per chip."""
    in_pod = min(num_chips, chip.pod_size)
    num_pods = -(-num_chips // chip.pod_size)
    seconds = 2 * (in_pod - 1) / in_pod * num_bytes / chip.link_bandwidth
    seconds += (in_pod > 1) * chip.axes * in_pod ** (1 / chip.axes) * HOP_SECONDS
    # Each chip adds its part of the pod's sum to the same part of the other pods.
    return seconds + 2 * (num_pods - 1) / num_pods * num_bytes / in_pod / chip.network_bandwidth


def device_bytes(config: ConfigDict, vocab_size: int, num_chips: int) -> int:
    """Return the bytes on each of `num_chips` chips: state, gradient, and its rows' activations."""
    rows = -(-config.batch_size // num_chips)
    replicated = state_bytes(config, vocab_size) + gradient_bytes(config, vocab_size)
    return replicated + activation_bytes(config, vocab_size, rows)


def check_rows(config: ConfigDict, chip: Chip, num_chips: int) -> None:
    """Raise UserError if the batch has fewer rows than there are chips."""
    if num_chips > config.batch_size:
        raise UserError(
            f"--chips={chip.name}:{num_chips}: config.batch_size={config.batch_size} has no row "
            "for each of them; raise it, or name fewer chips"
        )
