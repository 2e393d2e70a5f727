"""launch/compress.py in two processes."""

import re

import pytest
from helpers import small_config, untrained_run
from launching import WarmLauncher


@pytest.fixture(scope="module")
def launch():
    """Return launch(launcher, *flags, cwd=...)."""
    warm = WarmLauncher("charlstm.runs.checkpoints", "charlstm.evaluation.compression")
    yield warm
    warm.close()


def test_a_file_comes_back_in_another_process(tmp_path, book_path, book, launch):
    untrained_run(small_config(book_path), tmp_path / "run")
    raw = "\ufeffNaïve\r\n".encode() + book[:200].encode() + b"\xff"
    (tmp_path / "a.txt").write_bytes(raw)
    packed = launch("compress", "a.txt", "--workdir=run", cwd=tmp_path)
    assert (packed.returncode, packed.stderr) == (0, "")
    size = (tmp_path / "a.txt.clstm").stat().st_size
    assert packed.stdout.startswith(f"a.txt.clstm: {size:,} bytes\n")
    assert re.search(r"evaluated: [\d.]+ bits per character", packed.stdout)
    flags = ("--decompress", "a.txt.clstm", "--workdir=run")
    occupied = launch("compress", *flags, cwd=tmp_path)
    assert occupied.returncode == 2
    assert "a.txt: exists" in occupied.stderr
    (tmp_path / "a.txt").write_bytes(b"")
    answer = launch("compress", *flags, "--overwrite", cwd=tmp_path)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert (tmp_path / "a.txt").read_bytes() == raw
