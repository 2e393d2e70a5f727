"""Set up JAX, its compilation cache and the memory allocator for a launcher."""

import ctypes
import glob
import os
import platform
import re
import sys
import time
import warnings
import zlib
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from charlstm.cli import streams
from charlstm.errors import UserError, one_line
from charlstm.system.paths import cache_folder, given_path

VENDORS = {"0x1ae0", "0x10de", "0x1002"}  # of PCI devices: Google, NVIDIA, AMD
DEVICE_FILES = {"accel0", "vfio", "nvidiactl", "nvidia0", "kfd", "dxg"}
WRITING_SECONDS = 60  # another process may still write a file younger than this


def prepare() -> None:
    """Set the environment of JAX, NumPy and the C library, before they are imported.

    Raises:
      UserError: if the environment has a setting of JAX with which launchers cannot work.
    """
    for name, value in os.environ.items():
        if name.startswith("JAX_TRANSFER_GUARD") and value.startswith("disallow"):
            raise UserError(
                f"{name}={value}: launchers need transfers to devices; unset it, or set it to log"
            )
    # With more threads, the orthogonal initializer is slow and depends on the machine.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    # tensorboardX sets it otherwise, later, when XLA's threads may call getenv and then crash.
    os.environ.setdefault("CRC32C_SW_MODE", "auto")
    if has_only_compilers():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # else JAX tries to start them, with errors
    keep_compilations()
    keep_memory()


def has_only_compilers(root: Path = Path("/")) -> bool:
    """Return whether compilers for accelerators are installed, and no accelerator is.

    The compilers are libtpu and JAX's plugin for CUDA. `root` is the root folder of Linux.
    """
    if not find_spec("libtpu") and not find_spec("jax_cuda12_plugin"):
        return False
    vendors = {path.read_text().strip() for path in root.glob("sys/bus/pci/devices/*/vendor")}
    # A container may have a device and no list, and WSL has no PCI devices.
    names = {path.name for path in root.glob("dev/*")}
    return not vendors & VENDORS and not names & DEVICE_FILES


def prepare_compilers() -> None:
    """Set the environment in which JAX compiles for devices that this machine may not have.

    Call it before JAX is imported.
    """
    # JAX leaves the devices of this machine, if it has any, to other processes.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Programs for other machines cannot be read back from the cache.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    # Otherwise one process at a time can use libtpu, because of its lock file.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    # Otherwise libtpu asks the metadata server of a TPU VM, and prints that none answers.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_LOG_DIR", "disabled")  # no log files


def problem_of_jax(error: Exception) -> str:
    """Return how JAX's environment or devices cause `error`, or '' if they do not."""
    for name, value in os.environ.items():
        # JAX checks some values when it is imported.
        if name.startswith("JAX_") and name.lower() in str(error).lower():
            return f"{name}={value}: {one_line(error)}"
    if "jax" in sys.modules and isinstance(error, RuntimeError | AssertionError):
        import jax

        try:
            jax.devices()
        except (RuntimeError, AssertionError) as reason:
            wanted = os.environ.get("JAX_PLATFORMS")
            name = f"JAX_PLATFORMS={wanted}" if wanted else "JAX"
            # Without a CUDA plugin, JAX raises an AssertionError without a message.
            why = one_line(reason) if str(reason) else "no such device, or not installed"
            return f"{name}: no usable device ({why}); unset it, or install JAX for the device"
    return ""


def show_warning(message: Warning | str, *place: Any) -> None:
    """Print a warning as one line."""
    streams.show_line(f"warning: {one_line(message)}")


def keep_compilations() -> None:
    """Set JAX's persistent compilation cache, by default in the cache folder of the user.

    Each host has its own folder, because hosts of different kinds may share a home folder.
    """
    if (given := os.environ.get("JAX_COMPILATION_CACHE_DIR")) is not None:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = given_path(given)
        return
    try:
        folder = cache_folder() / "compiled" / platform.node()
    except UserError as error:
        show_warning(f"JAX cannot cache compiled programs: {error}")
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    pattern = re.compile("Error reading persistent compilation cache entry for '(.*?)'")

    def remove_and_show(message: Warning | str, *place: Any) -> None:
        if match := pattern.match(str(message)):
            remove_damaged(folder, match[1])
        show_warning(message)

    warnings.showwarning = remove_and_show  # type: ignore[assignment]


def remove_damaged(folder: Path, module: str) -> None:
    """Remove truncated cache entries of a compiled `module`, which JAX never replaces.

    Recent entries stay, because another process may be writing them.
    """
    for path in folder.glob(f"{glob.escape(module)}-*-cache"):
        with suppress(OSError):
            is_settled = time.time() - path.stat().st_mtime > WRITING_SECONDS
            if is_settled and path.is_file() and not _is_whole(path.read_bytes()):
                path.unlink()


def _is_whole(entry: bytes) -> bool:
    import zstandard

    # JAX uses zstandard if it is installed, else zlib.
    for make in (zstandard.ZstdDecompressor().decompressobj, zlib.decompressobj):
        decompressor: Any = make()
        with suppress(zstandard.ZstdError, zlib.error):
            decompressor.decompress(entry)
            if decompressor.eof:
                return True
    return False


def keep_memory() -> None:
    """Make glibc, if it is the C library, keep freed memory in the process.

    Otherwise each training step returns its memory to the system and faults it in again.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # from malloc.h
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(arena_max, 1)
