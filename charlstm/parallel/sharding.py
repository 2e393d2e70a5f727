"""Which device holds what: a mesh with one axis, `data`, over which the rows of batches are spread.

Parameters and optimizer state are on every device, whole; batch and carry are cut by rows. The
step is the same pure function as on one device: given inputs that lie so, XLA adds up the gradients
of all devices (an all-reduce), and they exchange nothing else.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from charlstm.data.batches import Batch
from charlstm.errors import UserError
from charlstm.steps import TrainState

AXIS = "data"


def make_mesh(config: ConfigDict) -> Mesh:
    """Return the mesh of `config.mesh.data` devices, those of each process side by side.

    Raises:
      UserError: if there are fewer devices, or they cannot share a batch evenly.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    size = len(devices) if config.mesh.data == -1 else config.mesh.data
    if size > len(devices):
        raise UserError(
            f"config.mesh.data={size}: there are {len(devices)} devices; use -1 to take all"
        )
    if jax.process_count() > 1 and size != len(devices):
        raise UserError(
            f"config.mesh.data={size}: the {jax.process_count()} processes have {len(devices)} "
            "devices, and none may stay idle; use -1 to take all"
        )
    if config.batch_size % size:
        fits = config.batch_size // size * size or size
        raise UserError(
            f"config.batch_size={config.batch_size}: {size} devices cannot share it evenly; use a "
            f"multiple of {size}, such as {fits}, or fewer devices with config.mesh.data"
        )
    return Mesh(np.array(devices[:size]), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return where an array lies that every device of `mesh` holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh, batch_size: int, axis: int = 0) -> NamedSharding:
    """Return where an array lies whose `axis` are B rows: cut over the devices.

    Rows that the devices cannot share evenly, as those of a short validation text, are on each.
    """
    if batch_size % mesh.size:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Return where each array of `state` lies: the carry by rows, all else on every device."""
    places = jax.tree.map(lambda leaf: replicated(mesh), state)
    carry = jax.tree.map(lambda leaf: by_rows(mesh, leaf.shape[0]), state.carry)
    return places._replace(carry=carry)


def local_rows(sharding: NamedSharding, batch_size: int) -> slice:
    """Return which of B rows, cut by by_rows, the devices of this process hold."""
    # make_mesh has the devices of a process side by side.
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    bounds = [index[0].indices(batch_size) for index in held if index]
    return slice(min(begin for begin, _, _ in bounds), max(end for _, end, _ in bounds))


def put_batch(rows: Batch, sharding: NamedSharding, batch_size: int) -> Batch:
    """Return a batch on the devices, of whose B rows this process has read `rows`.

    Several batches, with the axis S in front, are put so that `sharding` cuts the axis B behind it.
    """
    axis = rows.reset_B.ndim - 1

    def put(leaf: np.ndarray) -> jax.Array:
        shape = (*leaf.shape[:axis], batch_size, *leaf.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(sharding, leaf, shape)

    return Batch(*map(put, rows))


def whole(tree: Any) -> Any:
    """Return `tree` with arrays of NumPy, all rows of all processes, on each of them."""
    from jax.experimental.multihost_utils import process_allgather

    def gather(leaf: Any) -> np.ndarray:
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(gather, tree)


def on_one_device(tree: Any) -> Any:
    """Return the copies, on one device of this process, of arrays that every device holds whole."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def describe(mesh: Mesh) -> str:
    """Return the devices of `mesh` in words."""
    names = [str(device) for device in mesh.devices.flat]
    if len(names) <= 4:
        return ", ".join(names)
    kind = mesh.devices.flat[0].device_kind
    processes = len({device.process_index for device in mesh.devices.flat})
    where = f" in {processes} processes" if processes > 1 else ""
    return f"{len(names)} x {kind} ({names[0]} to {names[-1]}){where}"
