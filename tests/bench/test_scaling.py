import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from launching import command_of

from charlstm.bench import scaling
from charlstm.config import base_config
from charlstm.planning.chips import CHIPS

# In a process of its own, since XLA takes the number of devices once.
PROGRAM = """
import json, sys
from charlstm.bench.cases import Case
from charlstm.bench.scaling import scale
case = Case("train", 64, 16, hidden_size=32, vocab_size=11, num_layers=2)
results = scale(case, json.loads(sys.argv[2]), 4, json.loads(sys.argv[3]), sys.argv[1])
print(json.dumps([result._asdict() for result in results]))
"""


def scaled(counts, rows_per_device=None, dtype="float32"):
    arguments = [dtype, json.dumps(counts), json.dumps(rows_per_device)]
    flags = f"--xla_force_host_platform_device_count={max(counts)}"
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=os.environ | {"XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


@pytest.mark.slow
def test_eight_devices_agree_with_one():
    one, eight = scaled([1, 8])
    assert one["all_reduces"] == 0
    assert eight["all_reduces"] > 0
    assert eight["in_loops"] == 0
    assert eight["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert eight["difference"] < 1e-5
    assert one["losses"][-1] < one["losses"][0]


@pytest.mark.slow
def test_eight_devices_agree_with_one_in_bfloat16():
    # Each device rounds the sums over its own rows.
    one, eight = scaled([1, 8], dtype="bfloat16")
    assert eight["losses"] == pytest.approx(one["losses"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("rows_per_device", [None, 2])
def test_64_devices_agree_with_one(rows_per_device):
    for result in scaled([2, 4, 8, 16, 32, 64], rows_per_device):
        assert result["difference"] < 1e-5


# Starts the launcher with a small case, which has as many rows per device for both measurements.
LAUNCHER = """
import runpy, sys
from charlstm.bench import scaling
scaling.CASE = scaling.Case("train", 4, 8, hidden_size=8, vocab_size=5)
scaling.ROWS_PER_DEVICE, scaling.STEPS = 4, 2
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_launcher_writes_results_and_a_picture(tmp_path):
    flags = ["--devices=1", "--chip=v5p", "--config.batch_size=64", "--out=out"]
    python, *command = command_of("scaling", *flags)
    result = subprocess.run(
        [python, "-c", LAUNCHER, *command], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert [row["num_devices"] for row in report["virtual"]["weak"]] == [1]
    # A batch of 64 rows fits at most 64 chips.
    assert report["computed"]["strong"][-1]["chips"] == 64
    assert report["computed"]["weak"][-1]["chips"] == 1024
    assert (tmp_path / "out" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "strong, virtual devices" in result.stdout


def test_compiled_step_is_its_cycles_and_an_all_reduce(monkeypatch):
    config, chip = base_config(), CHIPS["v5e"]
    config.batch_size = 256
    asked = []

    def compile_for(config, topology):
        asked.append((config.batch_size, topology))
        step = {"estimated_cycles": 3_000_000 * config.batch_size}
        return SimpleNamespace(costs={"programs": {"training step": step}})

    monkeypatch.setattr(scaling, "compile_for", compile_for)
    found = scaling.compile_steps(config, chip, [1, 2, 4])
    assert asked == [(256, "v5e:1x1"), (64, "v5e:1x1"), (16, "v5e:1x1")]
    # 2 ms per row at 1.5 GHz. No program has 128 rows per chip.
    assert [row["chips"] for row in found["strong"]] == [1, 4]
    assert [row["chips"] for row in found["weak"]] == [1, 2, 4]
    assert found["strong"][0]["seconds"] == pytest.approx(0.512)
    assert 0.128 < found["strong"][1]["seconds"] < 0.129
    assert 0.512 < found["weak"][2]["seconds"] < 0.513
