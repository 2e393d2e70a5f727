"""Shard batches and states over a mesh with one axis, `data`.

Parameters and optimizer state are replicated; batches and carry are split by rows. The train step
is the pure function of one device: given such inputs, XLA inserts an all-reduce for the gradients.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from charlstm.data.batches import Batch
from charlstm.errors import UserError
from charlstm.model import CharLSTM
from charlstm.steps import TrainState, init_state

AXIS = "data"


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of `config.mesh.data` devices; the devices of a process are adjacent.

    Args:
      config: the settings.
      devices: where to take them from; None means jax.devices().

    Raises:
      UserError: if there are fewer devices, or if they do not divide the batch size.
    """
    given = jax.devices() if devices is None else devices
    devices = sorted(given, key=lambda device: (device.process_index, device.id))
    size = len(devices) if config.mesh.data == -1 else config.mesh.data
    if size > len(devices):
        raise UserError(
            f"config.mesh.data={size}: there are {len(devices)} devices; use -1 to take all"
        )
    if jax.process_count() > 1 and size != len(devices):
        raise UserError(
            f"config.mesh.data={size}: the {jax.process_count()} processes have {len(devices)} "
            "devices and must use all of them; use -1 to take all"
        )
    if config.batch_size % size:
        fits = config.batch_size // size * size or size
        raise UserError(
            f"config.batch_size={config.batch_size}: {size} devices cannot share it evenly; use a "
            f"multiple of {size}, such as {fits}, or fewer devices with config.mesh.data"
        )
    return Mesh(np.array(devices[:size]), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh, batch_size: int, axis: int = 0) -> NamedSharding:
    """Return the sharding of an array whose `axis` B is split over the devices.

    If the devices do not divide B, as with a short validation text, the array is replicated.
    """
    if batch_size % mesh.size:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def init_sharded(
    model: CharLSTM,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    batch_size: int,
    mesh: Mesh,
) -> tuple[TrainState, Callable[[jax.Array], TrainState]]:
    """Return the abstract initial state, and init(key) that computes the state on the devices.

    The abstract state holds a jax.ShapeDtypeStruct with a sharding for each array. Of `key` only
    the type matters.
    """
    make_state = partial(init_state, model, optimizer, batch_size=batch_size)
    state = jax.eval_shape(make_state, key)
    shardings = jax.tree.map(lambda leaf: replicated(mesh), state)
    carry = jax.tree.map(lambda leaf: by_rows(mesh, batch_size), state.carry)
    shardings = shardings._replace(carry=carry)
    abstract_state = jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding), state, shardings
    )
    return abstract_state, jax.jit(make_state, out_shardings=shardings)


def local_rows(sharding: NamedSharding, batch_size: int) -> slice:
    """Return the range of the B rows, sharded by `by_rows`, that this process holds."""
    # The devices of a process are adjacent in the mesh.
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    bounds = [index[0].indices(batch_size) for index in indices if index]
    return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def put_batch(rows: Batch, sharding: NamedSharding, batch_size: int) -> Batch:
    """Put the rows of a batch that this process has read on its devices; return the whole batch.

    Several batches, with a leading axis S, need a `sharding` that splits the second axis.
    """
    axis = rows.reset_B.ndim - 1

    def put(leaf: np.ndarray) -> jax.Array:
        shape = (*leaf.shape[:axis], batch_size, *leaf.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(sharding, leaf, shape)

    return Batch(*map(put, rows))


def to_host(tree: Any) -> Any:
    """Return `tree` with NumPy arrays, which hold the rows of all processes."""
    from jax.experimental.multihost_utils import process_allgather

    def gather(leaf: Any) -> np.ndarray:
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        # Each process holds a replicated array whole.
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            return process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(gather, tree)


def on_one_device(tree: Any) -> Any:
    """Return the copies of replicated arrays on one device of this process."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def describe(mesh: Mesh) -> str:
    """Return a description of the devices of `mesh`, such as 'TFRT_CPU_0'."""
    names = [str(device) for device in mesh.devices.flat]
    if len(names) <= 4:
        return ", ".join(names)
    kind = mesh.devices.flat[0].device_kind
    processes = len({device.process_index for device in mesh.devices.flat})
    where = f" in {processes} processes" if processes > 1 else ""
    return f"{len(names)} x {kind} ({names[0]} to {names[-1]}){where}"
