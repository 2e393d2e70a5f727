"""What a model and its training cost, on paper: counts, bytes, and the time of a step on a pod.

All functions are arithmetic on a config and V, the number of characters; no array is made. Sizes:
B = batch_size, T = seq_len, H = hidden_size, N = num_layers, E the size of a layer's input, P the
parameters, n the chips. A product of [a, b] and [b, c] is 2abc operations.

    layer           parameters 4H (E + H + 1)        operations a character 8H (E + H)
    scaled hidden   HE                               2HE
    normalised sums 4H
    dense           H V + V                          2 H V
    tied output     H E + E + V, beside V E          2 H E + 2 E V

One-hot input is a row looked up, so its 8 H E are not there on a CPU; on accelerators its gradient
is a product of 8 H V. Training takes three times the operations of the forward pass: each product
has two in its gradient, one for each factor (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).

The step of a pod is the sum of what has to wait for each other. In one layer each of T time steps,
forward and again backward, waits for the one before, and takes the longest of three:

    latency     what a turn of the loop takes however small its work is
    products    8 H^2 b / F          b = B / n rows of this chip, F its operations a second
    memory      (8 H^2 + 28 H b) / M the recurrent kernel [H, 4H], in two bytes each, and seven
                                     floats of each row, at M bytes a second (the roofline of
                                     Williams, Waterman and Patterson 2009)

The kernel is read again at every time step: below b = F / M rows, 240 on a v5e, and somewhat beyond
for the rows' own sake, a chip waits for its memory. Then come the products outside of the loops,
over all time steps at once, Adam's update, and one all-reduce of P gradients. A ring of n takes
2 (n - 1) / n times their bytes over W, what a chip sends a second (Patarasuk and Yuan 2009,
'Bandwidth optimal all-reduce algorithms for clusters of workstations'). On a torus of `axes` axes
it goes twice half-way along each, axes n^(1/axes) hops of 1 us ('How to Scale Your Model', Austin
et al. 2025, https://jax-ml.github.io/scaling-book/sharding). Beyond one pod, each of its chips
sends its part of the pod's sum through the network.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

FLOAT = 4  # bytes; parameters, gradients, Adam's moments and the carry are float32
HOP_SECONDS = 1e-6


class Chip(NamedTuple):
    """An accelerator, by its maker's figures, per chip and in bytes and operations a second."""

    name: str
    flops: float  # of bfloat16 products
    memory: float  # bytes
    memory_bandwidth: float
    link_bandwidth: float  # what it sends over all its links, half of 'bidirectional'
    axes: int  # of the torus; 1 where a switch joins all
    pod_size: int  # chips that the links join
    network_bandwidth: float  # beyond the pod
    loop_seconds: float  # overhead of one loop iteration over time; assumed, not measured
    source: str


_TPU = "https://docs.cloud.google.com/tpu/docs/"
_LINKS = "https://jax-ml.github.io/scaling-book/tpus"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32e9, 1.2e12, 2.7e11, 3, 4096, 6.25e9, 5e-6, f"{_TPU}v4, {_LINKS}"),
        Chip("v5e", 197e12, 16e9, 819e9, 2e11, 2, 256, 3.1e9, 5e-6, f"{_TPU}v5e"),
        Chip("v5p", 459e12, 95e9, 2.765e12, 6e11, 3, 8960, 6.25e9, 5e-6, f"{_TPU}v5p"),
        Chip("v6e", 918e12, 32e9, 1.638e12, 4e11, 2, 256, 12.5e9, 5e-6, f"{_TPU}v6e"),
        Chip(
            *("h100", 989e12, 80e9, 3.35e12, 4.5e11, 1, 8, 5e10, 20e-6),
            source="https://jax-ml.github.io/scaling-book/gpus (SXM; 8 a node)",
        ),
    )
}


def input_sizes(config: ConfigDict, vocab_size: int) -> list[int]:
    """Return E of each layer: V for one-hot characters, 1 for scaled ones."""
    model = config.model
    first = {"one_hot": vocab_size, "embed": model.embed_size, "scaled": 1}[model.input]
    return [first] + [model.hidden_size] * (model.num_layers - 1)


def count_params(config: ConfigDict, vocab_size: int) -> int:
    """Return P, the number of parameters."""
    model, hidden_size = config.model, config.model.hidden_size
    layers = sum(
        hidden_size * (_kernels(config) * size + 4 * hidden_size + 4 + 4 * model.recurrent_rms_norm)
        for size in input_sizes(config, vocab_size)
    )
    embed = vocab_size * model.embed_size if model.input == "embed" else 0
    to_vectors = (hidden_size + 1) * model.embed_size
    output = to_vectors if model.tie_embeddings else hidden_size * vocab_size
    return layers + embed + output + vocab_size


def flops_per_char(config: ConfigDict, vocab_size: int) -> int:
    """Return the operations of all matrix products of the forward pass, for one character.

    Training takes three times as many. What is not a product is not counted: on a CPU it is a few
    operations in a hundred for H from 128 on, though more of the time.
    """
    return scan_flops(config) + other_flops(config, vocab_size)


def scan_flops(config: ConfigDict) -> int:
    """Return those of flops_per_char that are in the loops over time, in all layers."""
    return 8 * config.model.hidden_size**2 * config.model.num_layers


def other_flops(config: ConfigDict, vocab_size: int) -> int:
    """Return those of flops_per_char that are done for all time steps at once."""
    model, sizes = config.model, input_sizes(config, vocab_size)
    as_one_hot = sizes[1:] if model.input == "one_hot" else sizes
    by_vectors = 2 * model.embed_size * (model.hidden_size + vocab_size)
    output = by_vectors if model.tie_embeddings else 2 * model.hidden_size * vocab_size
    return 2 * _kernels(config) * model.hidden_size * sum(as_one_hot) + output


def _kernels(config: ConfigDict) -> int:
    """Return how many kernels [E, H] of a layer read its input: four gates' and perhaps scales'."""
    return 4 + config.model.multiplicative


def activation_bytes(config: ConfigDict, vocab_size: int, batch_size: int | None = None) -> int:
    """Return the working memory of a training step of `batch_size` rows, by default all of them.

    In floats a character: for each layer the 7 that lstm.fused keeps, five more where the sums
    are normalised (it keeps four, and XLA was found to hold one), one for h before each step, two
    for what leaves the layer and its gradient, two for a mask drawn at each step, and where its
    input is vectors four for the gates' sums, and two for scales: computed and kept. Then those of
    one layer once more, since their gradient is held for one at a time. Each of these times H; and
    2.75 V for logits. XLA's own figure on a CPU is within an eighth of it from B T H = 1.6 million
    on (tests/test_cost.py), and more below, where the parameters' copies count.
    """
    model = config.model
    num_of_vectors = model.num_layers - (model.input == "one_hot")
    per_layer = 12 if model.dropout_rate and not model.variational_dropout else 10
    per_layer += 5 * model.recurrent_rms_norm
    from_vectors = 6 if model.multiplicative else 4
    floats = model.hidden_size * (
        per_layer * model.num_layers + from_vectors * (num_of_vectors + (num_of_vectors > 0))
    )
    rows = config.batch_size if batch_size is None else batch_size
    return int(FLOAT * rows * config.seq_len * (floats + 2.75 * vocab_size))


def state_bytes(config: ConfigDict, vocab_size: int) -> int:
    """Return the bytes of parameters, their average, Adam's two moments, carry, counters and key.

    That is what a checkpoint holds, but for its metadata and what Orbax writes about itself.
    """
    carry = 2 * config.batch_size * config.model.hidden_size * config.model.num_layers
    has_average = config.optimizer.average_window > 0
    counters = 2 + has_average + 1 + 2  # Adam's, the schedule's, the average's, the step, the key
    held = FLOAT * (count_params(config, vocab_size) + carry + counters)
    return held + optimizer_bytes(config, vocab_size)


def optimizer_bytes(config: ConfigDict, vocab_size: int) -> int:
    """Return the bytes of Adam's two moments, and of the parameters' average where there is one."""
    copies = 2 + (config.optimizer.average_window > 0)
    return FLOAT * copies * count_params(config, vocab_size)


def gradient_bytes(config: ConfigDict, vocab_size: int) -> int:
    """Return the bytes of one gradient, which is what an all-reduce sums."""
    return FLOAT * count_params(config, vocab_size)


class StepTime(NamedTuple):
    """The seconds of one training step on a pod, by what they are spent on."""

    # In the loops over time the longest of three counts, since they go on side by side.
    latency: float
    products: float
    memory: float
    # And these follow one another.
    outside: float  # products of all time steps at once
    update: float
    all_reduce: float

    @property
    def total(self) -> float:
        """The seconds of the step."""
        return max(self[:3]) + sum(self[3:])

    @property
    def limit(self) -> str:
        """The name of what takes longest."""
        return max(self._fields, key=lambda name: getattr(self, name))


def step_time(config: ConfigDict, vocab_size: int, chip: Chip, num_chips: int) -> StepTime:
    """Return what a step takes on `num_chips` chips that share the batch, by the formulae above.

    It is a lower bound: products run at their peak, nothing is padded to the lanes of a TPU, and
    what reads and writes vectors outside of the loops is left out. The all-reduce waits for the
    whole gradient.
    """
    rows = config.batch_size / num_chips
    hidden_size, num_layers = config.model.hidden_size, config.model.num_layers
    width = 2 if config.model.dtype == "bfloat16" else FLOAT
    kernel_bytes = 4 * hidden_size**2 * width
    kept_bytes = 7 * FLOAT * hidden_size * rows
    turns = 2 * config.seq_len * num_layers
    # The kernels' gradients, and all products that wait for no time step.
    lookup = 8 * hidden_size * vocab_size if config.model.input == "one_hot" else 0
    flops = scan_flops(config) + 3 * other_flops(config, vocab_size) + lookup
    summed = gradient_bytes(config, vocab_size)
    return StepTime(
        latency=turns * chip.loop_seconds,
        products=turns * 8 * hidden_size**2 * rows / chip.flops,
        memory=turns * (kernel_bytes + kept_bytes) / chip.memory_bandwidth,
        outside=flops * rows * config.seq_len / chip.flops,
        # Adam reads parameters, gradient and two moments, and writes all but the gradient.
        update=7 * summed / chip.memory_bandwidth,
        all_reduce=all_reduce_seconds(summed, chip, num_chips),
    )


def all_reduce_seconds(num_bytes: float, chip: Chip, num_chips: int) -> float:
    """Return the seconds in which all chips have the sum of `num_bytes` from each of them."""
    in_pod = min(num_chips, chip.pod_size)
    num_pods = -(-num_chips // chip.pod_size)
    seconds = 2 * (in_pod - 1) / in_pod * num_bytes / chip.link_bandwidth
    seconds += (in_pod > 1) * chip.axes * in_pod ** (1 / chip.axes) * HOP_SECONDS
    # Each chip of a pod holds a part of the pod's sum, and meets the same part of the others'.
    return seconds + 2 * (num_pods - 1) / num_pods * num_bytes / in_pod / chip.network_bandwidth


def device_bytes(config: ConfigDict, vocab_size: int, num_chips: int) -> int:
    """Return what one of `num_chips` chips has to hold: the whole state, its rows' activations."""
    rows = -(-config.batch_size // num_chips)
    whole = state_bytes(config, vocab_size) + gradient_bytes(config, vocab_size)
    return whole + activation_bytes(config, vocab_size, rows)
