"""Half an hour of training with frequent evaluations, checkpoints and pictures leaks nothing."""

import statistics
import subprocess
import time
from pathlib import Path

import pytest
from launching import command_of

MINUTES = 30


def usage(pid):
    """Return resident memory in MiB, open files and threads of a process."""
    lines = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return int(lines["VmRSS"].split()[0]) / 1024, files, int(lines["Threads"])


@pytest.mark.slow
def test_memory_files_and_threads_stay_constant(tmp_path, book):
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    (tmp_path / "book.txt").write_text(book, encoding="utf-8")
    flags = ["--config=tiny", "--config.data.path=book.txt", "--config.num_steps=2000000000"]
    # An evaluation with sample, curves and checkpoint every few seconds, and saves in between.
    flags += ["--config.eval_every_steps=400", "--config.checkpoint_every_steps=200"]
    flags += ["--config.log_every_steps=100", "--workdir=run"]
    readings = []
    end = time.monotonic() + 60 * MINUTES
    with (tmp_path / "log").open("wb") as log:
        command = command_of("train", *flags)
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
        try:
            while time.monotonic() < end:
                time.sleep(5)
                assert process.poll() is None, (tmp_path / "log").read_text()
                readings.append(usage(process.pid))
        finally:
            process.terminate()
            code = process.wait(timeout=60)
    assert code == 143
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    third = len(readings) // 3
    for name, values in zip(("MiB", "files", "threads"), zip(*readings, strict=True), strict=True):
        parts = [statistics.median(values[index * third :][:third]) for index in range(3)]
        print(f"{name}: medians of thirds {parts}, largest {max(values)}")
        # The records of metrics.jsonl take memory.
        allowed = 1.05 * parts[1] if name == "MiB" else parts[1]
        assert parts[2] <= allowed
    print(f"{len(records)} records in {MINUTES} minutes")
