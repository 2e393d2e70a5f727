"""native_library: the choice of the recurrence, and a machine that cannot compile native.cc."""

import jax
import pytest
from ml_collections import FrozenConfigDict

from charlstm.config import base_config
from charlstm.data.vocab import Vocab
from charlstm.errors import UserError
from charlstm.lstm import native_library
from charlstm.model import model_from_config, with_recurrence


def write_compiler(folder, script):
    """Write a C++ compiler that is a shell script."""
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.usefixtures("native_library")
def test_auto_is_native_for_float32_on_one_cpu():
    config = with_recurrence(base_config())
    assert config.model.recurrence == "native"
    assert base_config().model.recurrence == "auto"
    assert model_from_config(base_config(), Vocab("ab")).recurrence == "native"


def test_frozen_config_is_accepted():
    model = model_from_config(FrozenConfigDict(base_config()), Vocab("ab"))
    assert model == model_from_config(base_config(), Vocab("ab"))


@pytest.mark.parametrize(("dtype", "num_devices"), [("bfloat16", 1), ("float32", 2)])
def test_auto_is_fused_for_what_native_cannot_run(dtype, num_devices, caplog):
    caplog.set_level("INFO", "charlstm")
    assert native_library.choose(dtype, num_devices) == "fused"
    assert not caplog.records


def test_auto_is_fused_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert native_library.choose("float32") == "fused"


@pytest.mark.parametrize("name", ["fused", "native", "flax", "cudnn"])
def test_named_recurrence_stays(name, no_compiler):
    config = base_config()
    config.model.recurrence = name
    assert with_recurrence(config) == config


def test_without_a_compiler_auto_is_fused_with_one_line(no_compiler, caplog):
    caplog.set_level("INFO", "charlstm")
    assert [native_library.choose("float32") for _ in range(2)] == ["fused"] * 2
    (line,) = caplog.messages
    assert all(part in line for part in ("=fused", "c++, g++, clang++", "install"))
    with pytest.raises(UserError, match=r"^config.model.recurrence=native: .* c\+\+.* fused$"):
        native_library.load()
    assert not native_library.is_available()


@pytest.mark.usefixtures("native_library")
def test_built_library_needs_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(native_library, "_load", native_library._load.__wrapped__)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native_library.choose("float32") == "native"


def test_failing_compiler_makes_auto_fused_with_one_line(no_compiler, caplog):
    caplog.set_level("INFO", "charlstm")
    write_compiler(no_compiler, "echo 'fatal error: no space' >&2; exit 1")
    assert native_library.choose("float32") == "fused"
    (line,) = caplog.messages
    assert f"{no_compiler}/c++" in line
    assert "no space" in line
    with pytest.raises(UserError, match=r"^config.model.recurrence=native: .*no space.* fused$"):
        native_library.load()


@pytest.mark.parametrize("file", ["cache", "cache/native"])
def test_unusable_cache_makes_auto_fused_with_one_line(file, no_compiler, tmp_path, caplog):
    caplog.set_level("INFO", "charlstm")
    write_compiler(no_compiler, "exit 0")
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.touch()  # where a folder has to be
    assert native_library.choose("float32") == "fused"
    (line,) = caplog.messages
    assert str(tmp_path / "cache/native") in line
    assert "CHARLSTM_CACHE" in line
    with pytest.raises(UserError, match=r"^config.model.recurrence=native: .* fused$"):
        native_library.load()


def test_damaged_library_makes_auto_fused_with_one_line(no_compiler, caplog):
    caplog.set_level("INFO", "charlstm")
    # The compiler writes a text in place of a library.
    write_compiler(no_compiler, "for last; do :; done; case $last in *.so) echo x > $last;; esac")
    assert native_library.choose("float32") == "fused"
    (line,) = [line for line in caplog.messages if "compiling" not in line]
    assert "cannot be written or loaded" in line
