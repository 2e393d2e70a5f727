"""The environment of JAX that launchers set, and JAX's compilation cache."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import zstandard

from charlstm.cli import runtime
from charlstm.errors import UserError


def test_compilation_cache_is_in_the_users_cache_by_default(monkeypatch, tmp_path):
    monkeypatch.setenv("CHARLSTM_CACHE", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    runtime.keep_compilations()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr("warnings.showwarning", None)
    runtime.keep_compilations()
    assert Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).is_relative_to(tmp_path)


@pytest.mark.parametrize(
    ("packages", "vendor", "device", "wanted"),
    [
        ({"libtpu"}, "0x8086", "tty", True),
        ({"jax_cuda12_plugin"}, "0x8086", "tty", True),
        ({"libtpu", "jax_cuda12_plugin"}, "0x8086", "tty", True),
        ({"libtpu"}, "0x1ae0", "tty", False),  # Google, as of a TPU
        ({"libtpu", "jax_cuda12_plugin"}, "0x10de", "tty", False),  # NVIDIA
        ({"jax_cuda12_plugin"}, "0x8086", "nvidia0", False),  # in a container
        ((), "0x8086", "tty", False),
    ],
)
def test_compilers_without_an_accelerator_are_recognized(
    packages, vendor, device, wanted, monkeypatch, tmp_path
):
    monkeypatch.setattr(runtime, "find_spec", lambda name: name in packages or None)
    for name in ("sys/bus/pci/devices/0/vendor", f"dev/{device}"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(f"{vendor}\n")
    assert runtime.has_only_compilers(tmp_path) == wanted


# Compile, truncate the cache entry, compile again, and print the sizes before and after.
CUT_OFF = """
import os, sys, time, warnings
from pathlib import Path
from charlstm.cli import runtime
runtime.prepare()
import jax

def compile():
    jax.clear_caches()
    jax.jit(lambda x: jax.numpy.sin(x) @ x.T)(jax.numpy.ones((9, 9)))

compile()
folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
sizes = {path: path.stat().st_size for path in folder.glob("*lambda*-cache")}
for path, size in sizes.items():
    os.truncate(path, size // 2)
    os.utime(path, (0, 0))
compile()
print(*(f"{size} {path.stat().st_size}" for path, size in sizes.items()))
"""


def test_truncated_cache_entry_is_replaced(tmp_path):
    environment = os.environ | {"CHARLSTM_CACHE": str(tmp_path)}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    command = [sys.executable, "-c", CUT_OFF]
    answer = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert answer.stderr.startswith("warning: Error reading persistent compilation cache entry")
    before, after = map(int, answer.stdout.split())
    assert after > 0.9 * before


def test_remove_damaged_keeps_other_files(tmp_path):
    whole = zstandard.compress(b"a program" * 100)
    contents = {
        "jit_f-1-cache": whole,
        "jit_f-2-cache": zlib.compress(b"a program" * 100),
        "jit_f-3-cache": whole[:-3],
        "jit_f-4-cache": b"",
        "jit_f-5-cache": bytes(100),
        "jit_g-6-cache": whole[:-3],  # of another module
        "notes.txt": b"somebody's",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / "jit_f-7-cache").write_bytes(whole[:-3])  # another process may be writing it
    (tmp_path / "jit_f-8-cache").mkdir()
    (tmp_path / "xla_gpu_per_fusion_autotune_cache_dir").mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    runtime.remove_damaged(tmp_path, "jit_f")
    gone = before - {path.name for path in tmp_path.iterdir()}
    assert gone == {"jit_f-3-cache", "jit_f-4-cache", "jit_f-5-cache"}


def test_transfer_guard_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("JAX_TRANSFER_GUARD_HOST_TO_DEVICE", "disallow")
    with pytest.raises(UserError, match="JAX_TRANSFER_GUARD_HOST_TO_DEVICE=disallow"):
        runtime.prepare()


def test_problem_of_jax_ignores_other_errors(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert runtime.problem_of_jax(RuntimeError("something else")) == ""
    assert runtime.problem_of_jax(ValueError("jax is fine")) == ""
