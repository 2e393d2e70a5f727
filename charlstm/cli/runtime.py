"""Set up JAX, its compilation cache and the memory allocator for a command."""

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
from pathlib import Path
from typing import Any

from charlstm.cli import streams
from charlstm.errors import UserError, one_line
from charlstm.system.paths import cache_folder, given_path

WRITING_SECONDS = 60  # a file that has changed within these may be unfinished


def prepare() -> None:
    """Set what JAX, NumPy and the C library read when they are loaded.

    Raises:
      UserError: if a variable of the environment asks JAX for what the launchers cannot do.
    """
    for name, value in os.environ.items():
        if name.startswith("JAX_TRANSFER_GUARD") and value.startswith("disallow"):
            raise UserError(
                f"{name}={value}: launchers copy to devices; unset it, or set it to log"
            )
    # The orthogonal initialiser is slow, and its result depends on the machine, where OpenBLAS
    # spreads over threads. It reads this when JAX loads it.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    keep_compilations()
    keep_memory()


def problem_of_jax(error: Exception) -> str:
    """Return the problem of JAX's variables or devices behind `error`, '' if there is none."""
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
            # JAX asserts without a message that a plugin for CUDA is installed.
            why = one_line(reason) if str(reason) else "no such device, or not installed"
            return f"{name}: no device can be used ({why}); unset it, or install JAX for the device"
    return ""


def show_warning(message: Warning | str, *place: Any) -> None:
    """Show a warning as one line."""
    streams.show_line(f"warning: {one_line(message)}")


def keep_compilations() -> None:
    """Let JAX keep what it compiles for the next start, by default in the user's cache.

    Each machine has its own folder there, since machines of different kinds may share a home.
    """
    if (given := os.environ.get("JAX_COMPILATION_CACHE_DIR")) is not None:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = given_path(given)
        return
    try:
        folder = cache_folder() / "compiled" / platform.node()
    except UserError as error:
        show_warning(f"what JAX compiles is not kept for the next start: {error}")
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
    """Remove the entries of a compiled `module` that a kill has cut off: JAX never replaces them.

    Those that another process may be writing stay.
    """
    for path in folder.glob(f"{glob.escape(module)}-*-cache"):
        with suppress(OSError):
            is_settled = time.time() - path.stat().st_mtime > WRITING_SECONDS
            if is_settled and path.is_file() and not _is_whole(path.read_bytes()):
                path.unlink()


def _is_whole(entry: bytes) -> bool:
    import zstandard

    # JAX compresses by one of the two.
    for make in (zstandard.ZstdDecompressor().decompressobj, zlib.decompressobj):
        decompressor: Any = make()
        with suppress(zstandard.ZstdError, zlib.error):
            decompressor.decompress(entry)
            if decompressor.eof:
                return True
    return False


def keep_memory() -> None:
    """Tell glibc to keep freed memory, where there is a glibc.

    A training step needs tens of megabytes. Given back to the system after every step and fetched
    again, page by page, they cost an eighth of its time.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # from malloc.h
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(arena_max, 1)
