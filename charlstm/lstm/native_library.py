"""Compile native.cc on the user's machine, load it, and choose between it and fused_lstm."""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import CDLL
from functools import cache
from pathlib import Path

import jax
import jaxlib
from filelock import FileLock

from charlstm.errors import UserError, one_line
from charlstm.system.paths import cache_folder

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.cc")
COMPILERS = ("c++", "g++", "clang++")


def choose(dtype: str, num_devices: int = 1) -> str:
    """Return the fastest recurrence that runs here: 'native' or 'fused'.

    It is 'native' for float32 on one CPU device, if native.cc has been compiled or can be. If it
    cannot be compiled, the reason is logged once.
    """
    if dtype != "float32" or not runs_on(num_devices):
        return "fused"
    try:
        _load()
    except UserError as error:
        _log_once(
            "the LSTM runs in JAX (config.model.recurrence=fused), slower than in C++ (native) but "
            f"the same up to rounding: {error}"
        )
        return "fused"
    return "native"


def runs_on(num_devices: int) -> bool:
    """Return whether programs for `num_devices` devices of JAX's default backend use native.cc."""
    return num_devices == 1 and jax.default_backend() == "cpu"


def load() -> None:
    """Register native.cc with JAX, and compile it first unless the user's cache has it.

    Raises:
      UserError: if there is no working C++ compiler, or the cache cannot be written.
    """
    try:
        _load()
    except UserError as error:
        raise UserError(f"config.model.recurrence=native: {error}, or use fused") from error


def is_available() -> bool:
    """Return whether native_lstm can run, with native.cc or, on other platforms, without."""
    try:
        if jax.default_backend() == "cpu":
            _load()
    except UserError:
        return False
    return True


@cache
def _log_once(line: str) -> None:
    logger.info(line)


@cache
def _load() -> None:
    """Do what `load` does; the message of its UserError does not name the setting."""
    folder = cache_folder() / "native"
    try:
        library = CDLL(str(_build(folder)))
    except OSError as error:
        # An error of CDLL has no strerror.
        raise UserError(
            f"{folder}: cannot be written or loaded ({one_line(error.strerror or error)}); free "
            "space there, or set CHARLSTM_CACHE=FOLDER"
        ) from error
    for name in "Forward", "Backward":
        capsule = jax.ffi.pycapsule(getattr(library, f"Lstm{name}"))
        jax.ffi.register_ffi_target(f"charlstm_lstm_{name}", capsule, platform="cpu")


def _build(folder: Path) -> Path:
    """Return the compiled library in `folder` for this source, jaxlib, compiler and CPU.

    Where there is no compiler now, any compiler may have built it.
    """
    name = f"lstm-{_digest(SOURCE.read_bytes(), jaxlib.__version__.encode(), cpu_kind())}"
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None or _opens_dialog(compiler):
        if built := sorted(folder.glob(f"{name}-*.so")):
            return built[0]
        raise UserError(f"found none of the compilers {', '.join(COMPILERS)}; install one")
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    target = "-march=native" if is_x86 else "-mcpu=native"
    # The predefined macros name the compiler's version and the CPU's instructions.
    macros = _run_compiler([compiler, target, "-dM", "-E", "-x", "c++", os.devnull])
    library = folder / f"{name}-{_digest(macros)}.so"
    if library.exists():  # perhaps in a folder that this process cannot write
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not library.exists():
            logger.info(f"compiling the native LSTM once, with {compiler}")
            flags = ["-std=c++17", "-O3", target, "-ffp-contract=fast", "-shared", "-fPIC"]
            paths = [f"-I{jax.ffi.include_dir()}", str(SOURCE)]
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                output = Path(temporary) / library.name
                _run_compiler([compiler, *flags, *paths, "-o", str(output)])
                output.replace(library)
    return library


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def cpu_kind() -> bytes:
    """Return the kind of this CPU, and on Linux its instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_bytes().splitlines() if cpuinfo.exists() else []
    flags = next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
    return f"{platform.machine()} {platform.processor()}".encode() + flags


def _opens_dialog(compiler: str) -> bool:
    """Return whether `compiler` is that of a Mac without developer tools, which offers them."""
    if platform.system() != "Darwin" or not compiler.startswith("/usr/bin/"):
        return False
    return subprocess.run(["xcode-select", "-p"], capture_output=True).returncode != 0


def _run_compiler(command: list[str]) -> bytes:
    try:
        # In its own session: Ctrl-C must not end it, because the run then still saves its state.
        return subprocess.run(
            command, capture_output=True, check=True, start_new_session=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        lines = getattr(error, "stderr", b"").decode(errors="replace").splitlines()
        # The linker reports a full disk as 'failed'.
        detail = next((x for x in lines if "error" in x or "failed" in x), str(error))
        raise UserError(
            f"the compiler {command[0]} fails: {one_line(detail)}; install a working one"
        ) from error
