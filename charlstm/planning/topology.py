"""Describe accelerators to JAX that this machine may not have, so that it compiles for them."""

import re
from typing import Any

import jax
from jax.experimental import topologies

from charlstm.errors import UserError, one_line
from charlstm.planning.chips import CHIPS
from charlstm.system.extras import import_extra

# An axis without chips crashes libtpu.
_TOPOLOGY = re.compile(r"[a-zA-Z0-9]+:[1-9]\d{0,3}(x[1-9]\d{0,3}){0,2}")
# JAX joins the two cores of a v4 to one device, but libtpu does not by default.
_TPU_OPTIONS = {"v4": {"chip_config_name": "megacore"}}
# XLA's GpuTargetConfigProto, with the figures of h100_sxm in openxla/xla.
_GPU_TARGETS = {
    "h100": """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
""",
}


def topology_devices(word: str) -> list[Any]:
    """Return the devices of a topology, for which JAX can compile.

    charlstm.cli.runtime.prepare_compilers lists the environment variables that this needs.

    Args:
      word: TPUs such as 'v5e:4x4' or 'v4:2x2x1', GPUs of one host such as 'h100:8', or of several
        hosts such as 'h100:2x8'.

    Raises:
      UserError: if the compiler is missing or does not know the topology.
    """
    if not _TOPOLOGY.fullmatch(word):
        raise UserError(
            f"--compile={word}: must be NAME:AxB or NAME:AxBxC for TPUs, such as v5e:4x4, and "
            "NAME:N or NAME:HOSTSxN for GPUs, such as h100:8"
        )
    name, _, sizes = word.partition(":")
    find = _gpus if name in _GPU_TARGETS else _tpus
    try:
        return find(word, name, sizes).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise UserError(
            f"--compile={word}: is not a known topology of TPUs ({one_line(error)}); known GPUs: "
            f"{', '.join(_GPU_TARGETS)}"
        ) from error


def _tpus(word: str, name: str, sizes: str) -> topologies.TopologyDescription:
    import_extra("libtpu", "tpu", f"--compile={word} works on Linux on x86-64 only and")
    options: dict[str, Any] = {**_TPU_OPTIONS.get(name, {})}
    if set(sizes.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)  # older versions of libtpu assume 2x2x1
    return topologies.get_topology_desc(word, "tpu", **options)


def _gpus(word: str, name: str, sizes: str) -> topologies.TopologyDescription:
    *hosts, gpus = sizes.split("x")
    if len(hosts) > 1 or int(gpus) > CHIPS[name].pod_size:
        raise UserError(
            f"--compile={word}: must be {name}:N or {name}:HOSTSxN, with at most "
            f"{CHIPS[name].pod_size} GPUs on each host"
        )
    purpose = f"--compile={word} works on Linux on x86-64 only and"
    import_extra("jax_cuda12_plugin", "cuda-compiler", purpose)
    shape = "x".join(["1", *(hosts or ["1"]), gpus])
    return topologies.get_topology_desc(
        platform="cuda", target_config=_GPU_TARGETS[name], topology=shape
    )
