import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from launching import command_of

from charlstm import planning
from charlstm.config import base_config
from charlstm.errors import UserError
from charlstm.planning.chips import chip_bytes

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'"
)
needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs JAX's plugin for CUDA: pip install -e '.[cuda-compiler]'",
)
# Fewer operations than the default ones, which halves the time to compile.
PLAIN = {"optimizer.name": "adam", "optimizer.weight_decay": 0.0, "optimizer.average_window": 0.0}
PLAIN |= {"optimizer.schedule": "constant", "optimizer.warmup_steps": 0, "seq_len": 16}
SMALL = PLAIN | {"batch_size": 16, "model.hidden_size": 128}
WIDE = PLAIN | {"batch_size": 64, "model.hidden_size": 1024, "model.dtype": "bfloat16"}


def compiled(topology, book_path, settings, *options):
    """Return what `launch/plan.py --compile` prints as JSON."""
    given = {"data.path": book_path, **settings}
    flags = [f"--config.{key}={value}" for key, value in given.items()]
    command = command_of("plan", f"--compile={topology}", "--json", *options, *flags)
    result = subprocess.run(
        command, cwd=book_path.parent, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if "compiling" not in line] == []
    return json.loads(result.stdout)


def config_of(settings):
    config = base_config()
    config.update_from_flattened_dict(settings)
    return config


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("settings", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5e:2x2"])
def test_tpu_program_sums_once_and_keeps_kernels_on_chip(topology, settings, book_path):
    costs = compiled(topology, book_path, settings)
    num_chips = {"v5e:1x1": 1, "v5e:2x2": 4}[topology]
    assert costs["devices"] == num_chips
    step, evaluation, sampler = costs["programs"].values()
    assert step["fits"]
    # The compiler stores all kernels of the loops over time as bfloat16.
    kernel_bytes = 2 * 4 * settings["model.hidden_size"] ** 2
    kernels = {(one["pass"], one["bytes"]) for one in step["kernels_in_loops"]}
    assert kernels == {("forward", kernel_bytes), ("backward", kernel_bytes)}
    for program in (step, evaluation, sampler):
        assert program["kernels_in_loops"]
        assert all(kernel["memory"] == "VMEM" for kernel in program["kernels_in_loops"])
        assert not any(one["in_loop"] for one in program["collectives"])
    assert not sampler["collectives"]
    sums = [one for one in step["collectives"] if one["kind"] == "all-reduce"]
    assert sums == step["collectives"]
    if num_chips == 1:
        assert not sums
        return
    # One for the arrays of each type, and one for the number of characters.
    assert [one["arrays"] for one in sums if one["bytes"] == 4] == [1]
    assert len(sums) == 1 + len({dtype for one in sums for dtype in one["dtypes"]})
    width = 2 if "model.dtype" in settings else 4
    gradient_bytes = width * costs["parameters"]
    assert sum(one["bytes"] for one in sums) == pytest.approx(gradient_bytes, rel=0.01)


@needs_plugin
@pytest.mark.slow
def test_gpu_program_sums_outside_loops_over_time(book_path):
    costs = compiled("h100:2", book_path, WIDE)
    assert costs["devices"] == 2
    step, evaluation, sampler = costs["programs"].values()
    assert step["fits"]
    assert {loop["pass"] for loop in step["operations_in_loops"]} == {"forward", "backward"}
    for program in (step, evaluation, sampler):
        assert all(loop["operations"] > 0 for loop in program["operations_in_loops"])
        assert not any(one["in_loop"] for one in program["collectives"])
    assert not sampler["collectives"]
    assert {one["kind"] for one in step["collectives"]} == {"all-reduce"}
    # Each gradient once. XLA for GPUs does not sum arrays of several types together.
    widths = {"bf16": 2, "f32": 4}
    sizes = [one["bytes"] / widths["+".join(one["dtypes"])] for one in step["collectives"]]
    assert sum(sizes) == pytest.approx(costs["parameters"], rel=0.01)


@needs_libtpu
@pytest.mark.slow
def test_memory_by_formula_agrees_with_the_compiler(book_path):
    # Large enough that the arrays of a step do not fit the memory on the chip.
    settings = PLAIN | {"batch_size": 1024, "seq_len": 128, "model.hidden_size": 512}
    settings |= {"model.multiplicative": False, "model.recurrent_rms_norm": False}
    settings["model.dropout_rate"] = 0.0
    costs = compiled("v5e:1x1", book_path, settings)
    expected = chip_bytes(config_of(settings), costs["vocabulary"], num_chips=1)
    needed = costs["programs"]["training step"]["needed_bytes"]
    # The formula follows libtpu 0.0.52; the program of 0.0.42 takes a sixth more.
    tolerance = 0.1 if version("libtpu") >= "0.0.52" else 0.2
    assert expected / needed == pytest.approx(1, abs=tolerance)


@needs_libtpu
@pytest.mark.slow
def test_largest_batch_fills_the_memory_of_a_chip(book_path):
    settings = PLAIN | {"seq_len": 64, "batch_size": 16384, "model.hidden_size": 256}
    costs = compiled("v5e:1x1", book_path, settings, "--largest_batch")
    found = costs["largest_batch"]
    assert found["batch_size"] == found["rows_per_device"]
    assert 0 < found["refused_rows"] - found["rows_per_device"] <= found["rows_per_device"] / 16
    settings["batch_size"] = found["batch_size"]
    # The formula is an estimate; see the test above.
    expected = chip_bytes(config_of(settings), costs["vocabulary"], num_chips=1)
    assert 0.8 < expected / costs["programs"]["training step"]["hbm_bytes"] < 1.1


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e", r"--compile=v5e: must be NAME:AxB"),
        ("h100:1x2x8", r"--compile=h100:1x2x8: must be h100:N or h100:HOSTSxN"),
        ("h100:9", "at most 8 GPUs"),
        ("v5e:0x1", r"--compile=v5e:0x1: must be NAME:AxB"),  # crashes libtpu
    ],
)
def test_topology_of_another_form_is_an_error(topology, message):
    with pytest.raises(UserError, match=message):
        planning.compile_for(base_config(), topology)


@pytest.mark.parametrize(
    ("topology", "package", "extra"),
    [("v5e:2x2", "libtpu", "tpu"), ("h100:8", "jax_cuda12_plugin", "cuda-compiler")],
)
def test_missing_compiler_is_an_error_that_names_the_extra(topology, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"--compile={topology} .*Linux.*'\.\[{extra}\]'"):
        planning.compile_for(base_config(), topology)
