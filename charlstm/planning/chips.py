"""Memory and time of a training step on accelerators, by formula.

Sizes are those of charlstm.planning.cost. The time of a step on n chips is a sum of parts that wait
for each other. In the loop over time of a layer, each of T steps waits for the one before, forward
and backward, and takes the longest of:

    latency     the overhead of a loop iteration
    products    8 H^2 b / F            for b = B / n rows at F operations per second
    memory      (r + g) H b / M        at M bytes per second, for r bytes of residuals and g bytes
                                       of preactivations or of their gradients per row and unit

(the roofline of Williams, Waterman and Patterson 2009). The forward loop writes the residuals and
reads the preactivations; the backward loop reads the residuals and writes the gradients. XLA keeps
the recurrent kernel, 8 H^2 bytes in bfloat16, on the chip over all iterations where it can: in
VMEM on a TPU, in CMEM on a v4. The formula takes half of that memory as the limit. A larger kernel
adds 8 H^2 / M to each iteration, as any does on a GPU, where no memory keeps a kernel from one
operation to the next.

Outside the loops are the products of all time steps at once, Adam's update and one all-reduce of P
gradients in the type of the products, as the gradients of kernels are. On a ring of n chips that
send W bytes per second, it takes 2 (n - 1) / n times the bytes over W (Patarasuk and Yuan 2009,
'Bandwidth optimal all-reduce algorithms for clusters of workstations'). On a torus with `axes` axes
it also takes axes n^(1/axes) hops of 1 us, half the length of each axis twice (Austin et al. 2025,
'How to Scale Your Model', https://jax-ml.github.io/scaling-book/sharding). Chips beyond one pod add
up the sums of their pods over the network.

README.md compares memory and time with what the compiler of TPUs reports, and lists where it
leaves a kernel in memory.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from charlstm.errors import UserError
from charlstm.planning.cost import (
    FLOAT,
    count_params,
    other_flops,
    residual_bytes,
    scan_flops,
    state_bytes,
)

HOP_SECONDS = 1e-6
KERNEL_SHARE = 0.5  # of the memory on a chip: compiled for a v5e, 63 MB stay there and 75 MB do not
LANES = 128  # of a TPU, to which it pads the last axis of an array
# Of the training loop, which this module cannot import.
MAX_CALL_STEPS, MAX_CALL_CHARS = 32, 2**22
CHUNK_ROWS = 4096  # of the gradient of the kernels, as in lstm.backward
GIB = 2**30
MIB = 2**20


class Chip(NamedTuple):
    """The data sheet of an accelerator, per chip, in bytes, operations and seconds."""

    name: str
    flops: float  # of bfloat16 products
    memory: float  # that a program may use; of TPUs as the compiler of libtpu 0.0.52 says
    memory_bandwidth: float
    on_chip: float  # memory on the chip that can hold a kernel over a loop
    clock: float  # cycles per second
    link_bandwidth: float  # sent over all links, half of the 'bidirectional' bandwidth
    axes: int  # of the torus; 1 for a switch
    pod_size: int  # chips that are joined by links
    network_bandwidth: float  # between pods
    loop_seconds: float  # overhead of a loop iteration
    source: str


_TPU = "https://docs.cloud.google.com/tpu/docs/"
_LINKS = "https://jax-ml.github.io/scaling-book/tpus"
# VMEM of all cores, and CMEM of a v4: jax/_src/pallas/mosaic/tpu_info.py of jax 0.10.2.
_ON_CHIP = 128 * MIB
# The compiler's estimate for an iteration of a model of 64 units, forward and backward on average.
_LOOP_CYCLES = 17_000

# Clocks: peak operations over twice the multipliers of all matrix units. For a v6e, the number of
# which differs between sources, such that the compiler's cycles for a product of 8,192^3 take 1.11
# times what they take at peak, as for the others.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            flops=275e12,
            memory=30.75 * GIB,
            memory_bandwidth=1.2e12,
            on_chip=_ON_CHIP,
            clock=1.05e9,
            link_bandwidth=2.7e11,
            axes=3,
            pod_size=4096,
            network_bandwidth=6.25e9,
            loop_seconds=_LOOP_CYCLES / 1.05e9,
            source=f"{_TPU}v4, {_LINKS}",
        ),
        Chip(
            name="v5e",
            flops=197e12,
            memory=15.75 * GIB,
            memory_bandwidth=819e9,
            on_chip=_ON_CHIP,
            clock=1.5e9,
            link_bandwidth=2e11,
            axes=2,
            pod_size=256,
            network_bandwidth=3.1e9,
            loop_seconds=_LOOP_CYCLES / 1.5e9,
            source=f"{_TPU}v5e",
        ),
        Chip(
            name="v5p",
            flops=459e12,
            memory=95.73 * GIB,
            memory_bandwidth=2.765e12,
            on_chip=_ON_CHIP,
            clock=1.75e9,
            link_bandwidth=6e11,
            axes=3,
            pod_size=8960,
            network_bandwidth=6.25e9,
            loop_seconds=_LOOP_CYCLES / 1.75e9,
            source=f"{_TPU}v5p",
        ),
        Chip(
            name="v6e",
            flops=918e12,
            memory=31.24 * GIB,
            memory_bandwidth=1.638e12,
            on_chip=_ON_CHIP,
            clock=2.24e9,
            link_bandwidth=4e11,
            axes=2,
            pod_size=256,
            network_bandwidth=12.5e9,
            loop_seconds=_LOOP_CYCLES / 2.24e9,
            source=f"{_TPU}v6e",
        ),
        Chip(
            name="h100",
            flops=989e12,
            memory=0.75 * 84.94e9,  # JAX takes three quarters: XLA_PYTHON_CLIENT_MEM_FRACTION
            memory_bandwidth=3.35e12,
            on_chip=0.0,
            clock=1.83e9,
            link_bandwidth=4.5e11,
            axes=1,
            pod_size=8,
            network_bandwidth=5e10,
            loop_seconds=20e-6,  # assumed: about ten operations of 2 us each
            source="https://jax-ml.github.io/scaling-book/gpus (SXM; 8 a node)",
        ),
    )
}


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
    elementwise operations are not counted. The all-reduce starts after the whole gradient.
    """
    rows = config.batch_size / num_chips
    hidden_size, num_layers = config.model.hidden_size, config.model.num_layers
    unit_bytes = residual_bytes(config) + preactivation_bytes(config)
    row_bytes = unit_bytes * hidden_size * rows
    iterations = 2 * config.seq_len * num_layers
    # The gradients of the recurrent kernels, and all products that wait for no time step.
    lookup = 8 * hidden_size * vocab_size if config.model.input == "one_hot" else 0
    flops = scan_flops(config) + 3 * other_flops(config, vocab_size) + lookup
    num_params = count_params(config, vocab_size)
    return StepTime(
        latency=iterations * chip.loop_seconds,
        products=iterations * 8 * hidden_size**2 * rows / chip.flops,
        memory=iterations * (read_again(config, chip) + row_bytes) / chip.memory_bandwidth,
        outside=flops * rows * config.seq_len / chip.flops,
        # Adam reads parameters, gradient and two moments, and writes all except the gradient.
        update=7 * FLOAT * num_params / chip.memory_bandwidth,
        all_reduce=all_reduce_seconds(product_bytes(config) * num_params, chip, num_chips),
    )


def chip_bytes(config: ConfigDict, vocab_size: int, num_chips: int) -> int:
    """Return the bytes of a training step on each of `num_chips` TPUs: state, batches, temporaries.

    Temporaries per row, time step and unit: the residuals of all layers; the preactivations of
    layers with dense input, where the backward pass reads them for the scale or the norm; and the
    gradient of one layer's output. To these add the larger of two that follow one another: logits
    in float32 and in the type of the products, padded to LANES characters; or the gradient of one
    layer's preactivations, if its input is dense, with four sums and their gradients of CHUNK_ROWS
    rows. Last, the gradient of the parameters, and a copy of them in the type of the products.
    """
    model, width = config.model, product_bytes(config)
    rows = -(-config.batch_size // num_chips)
    num_dense = model.num_layers - (model.input == "one_hot")
    is_norm_read = model.recurrent_rms_norm and width < FLOAT
    num_read = num_dense * (model.multiplicative or is_norm_read)
    unit_bytes = model.num_layers * residual_bytes(config) + width
    unit_bytes += preactivation_bytes(config) * num_read
    places = rows * config.seq_len
    logits = (FLOAT + width) * LANES * -(-vocab_size // LANES) * places
    chunk = min(places, CHUNK_ROWS) * (4 + 4) * width * model.hidden_size
    inputs = (num_dense > 0) * preactivation_bytes(config) * places * model.hidden_size
    temporary = unit_bytes * places * model.hidden_size + max(logits, inputs + chunk)
    temporary += (FLOAT + width) * count_params(config, vocab_size)
    carry = 2 * FLOAT * model.hidden_size * model.num_layers * (config.batch_size - rows)
    return state_bytes(config, vocab_size) - carry + batch_bytes(config, num_chips) + temporary


def batch_bytes(config: ConfigDict, num_chips: int) -> int:
    """Return the bytes of the batches of one call of steps: ids, targets and weights."""
    places = config.batch_size * config.seq_len
    return 3 * 4 * max(places, min(MAX_CALL_STEPS * places, MAX_CALL_CHARS)) // num_chips


def product_bytes(config: ConfigDict) -> int:
    """Return the bytes of a number in the type of the products."""
    return 2 if config.model.dtype == "bfloat16" else FLOAT


def preactivation_bytes(config: ConfigDict) -> int:
    """Return the bytes of preactivations per row, time step and unit: four gates and the scale."""
    return (4 + config.model.multiplicative) * product_bytes(config)


def kernel_bytes(config: ConfigDict) -> int:
    """Return the bytes of a recurrent kernel in a loop: the compilers of TPUs take bfloat16."""
    return 4 * config.model.hidden_size**2 * 2


def read_again(config: ConfigDict, chip: Chip) -> int:
    """Return how many bytes of the recurrent kernel each iteration reads from memory."""
    return 0 if kernel_bytes(config) <= KERNEL_SHARE * chip.on_chip else kernel_bytes(config)


def all_reduce_seconds(num_bytes: float, chip: Chip, num_chips: int) -> float:
    """Return the seconds of an all-reduce of `num_bytes` per chip."""
    in_pod = min(num_chips, chip.pod_size)
    num_pods = -(-num_chips // chip.pod_size)
    seconds = 2 * (in_pod - 1) / in_pod * num_bytes / chip.link_bandwidth
    seconds += (in_pod > 1) * chip.axes * in_pod ** (1 / chip.axes) * HOP_SECONDS
    # Each chip adds its part of the pod's sum to the same part of the other pods.
    return seconds + 2 * (num_pods - 1) / num_pods * num_bytes / in_pod / chip.network_bandwidth


def check_rows(config: ConfigDict, chip: Chip, num_chips: int) -> None:
    """Raise UserError if the batch has fewer rows than there are chips."""
    if num_chips > config.batch_size:
        raise UserError(
            f"--chips={chip.name}:{num_chips}: config.batch_size={config.batch_size} has no row "
            "for each of them; raise it, or name fewer chips"
        )
