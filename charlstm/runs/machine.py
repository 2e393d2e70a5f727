"""Versions, devices and memory of this machine, checks of a config against them, and a profile."""

import itertools
import logging
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from charlstm.errors import UserError
from charlstm.lstm import native_library
from charlstm.planning import cost
from charlstm.planning.chips import chip_bytes

logger = logging.getLogger(__name__)


def this_machine() -> dict[str, Any]:
    """Return the versions and devices for config.json."""
    names = ("charlstm", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
    versions = {"python": platform.python_version()} | {name: version(name) for name in names}
    return {"versions": versions, "devices": [str(device) for device in jax.devices()]}


def default_prng_impl() -> str:
    """Return JAX's name for its default implementation of random keys."""
    return str(jax.random.key_impl(jax.random.key(0)))


def check_backend(config: ConfigDict) -> None:
    """Raise UserError if the settings of JAX or its devices do not allow to train `config`."""
    if not jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
        raise UserError(
            "jax_threefry_partitionable=False: changes the random numbers, so that a run could not "
            "be resumed exactly; unset JAX_THREEFRY_PARTITIONABLE"
        )
    if config.model.recurrence == "native" and jax.default_backend() == "cpu":
        native_library.load()
    if config.model.recurrence == "cudnn" and jax.default_backend() != "gpu":
        raise UserError(
            "config.model.recurrence=cudnn: needs an NVIDIA GPU, but the backend of JAX is "
            f"{jax.default_backend()}; use fused"
        )


def check_memory(config: ConfigDict, vocab_size: int, mesh: Mesh) -> None:
    """Raise UserError if training with V = `vocab_size` needs more memory than there is."""
    model = config.model
    if mesh.devices.flat[0].platform == "cpu":
        # The devices of a CPU share its memory.
        needed = cost.device_bytes(config, vocab_size, mesh.size) * len(mesh.local_devices)
    else:
        needed = chip_bytes(config, vocab_size, mesh.size)
    if needed > (available := memory_bytes()):
        raise UserError(
            f"config.model.hidden_size={model.hidden_size}, config.model.num_layers="
            f"{model.num_layers}, config.batch_size={config.batch_size}, config.seq_len="
            f"{config.seq_len}, {vocab_size:,} different characters: training needs about "
            f"{needed / 2**30:,.0f} GiB of memory, of {available / 2**30:,.0f}; lower one of them"
        )


def memory_bytes() -> float:
    """Return the memory of a device in bytes, or of the machine if the device reports none."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # not available on every system
        return float("inf")


def traced_once(function: Callable[..., Any], folder: epath.Path) -> Callable[..., Any]:
    """Return `function` with a trace of its second call, after compilation, in `folder`.

    TensorBoard's profile plugin opens the folder, ui.perfetto.dev its perfetto_trace.json.gz.
    """
    calls = itertools.count(1)

    def traced(*args: Any) -> Any:
        if next(calls) != 2:
            return function(*args)
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            results = jax.block_until_ready(function(*args))
        logger.info("wrote a trace of one call to %s", folder)
        return results

    return traced
