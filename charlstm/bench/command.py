"""Run launch/train.py, and describe the machine."""

import importlib.metadata
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from charlstm.bench.cases import Case
from charlstm.bench.timing import peak_mib
from charlstm.cli import streams
from charlstm.errors import RunError


def run_training(case: Case, text: Path, num_steps: int) -> tuple[float, float]:
    """Run launch/train.py with the sizes of `case`; return its seconds and its peak MiB.

    Called in a new process, whose only child is the command. The run folder and the caches of
    compiled programs and texts lie beside `text`.

    Raises:
      RunError: if the command fails.
    """
    folder = text.parent
    flags = [
        f"--workdir={tempfile.mkdtemp(dir=folder)}",
        f"--config.data.path={text}",
        f"--config.num_steps={num_steps}",
        f"--config.batch_size={case.batch_size}",
        f"--config.seq_len={case.seq_len}",
        f"--config.model.hidden_size={case.hidden_size}",
    ]
    caches = {"CHARLSTM_CACHE": "cache", "JAX_COMPILATION_CACHE_DIR": "compiled"}
    environment = os.environ | {name: str(folder / cache) for name, cache in caches.items()}
    command = [sys.executable, f"{streams.LAUNCH}/train.py", *flags]
    begin = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - begin
    if ended.returncode:
        last_line = (ended.stderr.strip().splitlines() or [""])[-1]
        raise RunError(f"launch/train.py ended with {ended.returncode}: {last_line}")
    return seconds, peak_mib(resource.RUSAGE_CHILDREN)


def write_random_text(path: Path, case: Case, size: int = 850_000) -> Path:
    """Write a text with all V characters of `case`, and return `path`."""
    # CJK characters, which cleaning does not change.
    alphabet = [chr(0x4E00 + index) for index in range(case.vocab_size)]
    chosen = random.Random(0).choices(alphabet, k=size - case.vocab_size)
    path.write_text("".join(alphabet + chosen), encoding="utf-8")
    return path


def describe_machine() -> dict[str, Any]:
    """Return the processor, the system and the versions of the packages that are installed."""
    packages = "charlstm", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "keras"
    installed = {each.name.lower(): each.version for each in importlib.metadata.distributions()}
    return {
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in packages if name in installed},
    }


def cpu_model() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).split(": ")[1]
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
