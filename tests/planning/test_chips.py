import pytest

from charlstm.config import base_config
from charlstm.lstm import backward
from charlstm.planning import chips, cost
from charlstm.planning.chips import CHIPS, all_reduce_seconds, chip_bytes, step_time
from charlstm.training import loop


def wide_config(**model):
    config = base_config()
    config.model.update({"hidden_size": 2048, "num_layers": 2, "dtype": "bfloat16"} | model)
    config.batch_size, config.seq_len = 4096, 128
    return config


@pytest.mark.parametrize("name", CHIPS)
def test_more_chips_only_slow_down_the_all_reduce(name):
    steps = [step_time(wide_config(), 96, CHIPS[name], 2**power) for power in range(11)]
    alone = [step.total - step.all_reduce for step in steps]
    assert alone == sorted(alone, reverse=True)
    assert steps[0].all_reduce == 0
    sums = [step.all_reduce for step in steps]
    assert sums == sorted(sums)


def test_small_model_is_limited_by_latency():
    chip = CHIPS["v5e"]
    config = wide_config(hidden_size=64, num_layers=1)
    step = step_time(config, 96, chip, 16)
    assert step.limit == "latency"
    assert step.latency == pytest.approx(2 * config.seq_len * chip.loop_seconds)


def test_kernel_that_fits_the_chip_is_not_read_again():
    # 34 MB of 128 MiB: what is left depends on the rows alone.
    chip = CHIPS["v5e"]
    few, many = (step_time(wide_config(), 96, chip, 4096 // rows) for rows in (64, 1024))
    assert many.memory == pytest.approx(16 * few.memory)
    # Six numbers are kept and five preactivations read, of two bytes each.
    iterations, unit_bytes = 2 * 128 * 2, 2 * (6 + 5)
    assert few.memory == pytest.approx(iterations * unit_bytes * 2048 * 64 / 819e9)


@pytest.mark.parametrize(("name", "hidden_size"), [("v5e", 4096), ("h100", 2048)])
def test_kernel_that_does_not_fit_is_read_by_each_iteration(name, hidden_size):
    chip, config = CHIPS[name], wide_config()
    config.model.hidden_size, config.batch_size = hidden_size, 1
    kernel_bytes = 8 * hidden_size**2
    iterations = 2 * 128 * 2
    memory = step_time(config, 96, chip, 1).memory
    assert memory == pytest.approx(iterations * kernel_bytes / chip.memory_bandwidth, rel=0.01)


def test_step_takes_at_least_its_products():
    config, chip = wide_config(), CHIPS["v5p"]
    flops = 3 * cost.flops_per_char(config, 96) * config.batch_size * config.seq_len
    assert step_time(config, 96, chip, 1).total >= flops / chip.flops


def test_all_reduce_sends_each_byte_twice_around_the_ring():
    chip = CHIPS["v5e"]
    assert all_reduce_seconds(1e9, chip, 1) == 0
    hops = 2 * 256**0.5 * 1e-6
    assert all_reduce_seconds(1e9, chip, 256) == pytest.approx(2 * 255 / 256 * 1e9 / 2e11 + hops)
    # Four pods: each chip adds up 1/256 of the bytes over the network.
    beyond = 2 * 3 / 4 * 1e9 / 256 / 3.1e9
    assert all_reduce_seconds(1e9, chip, 1024) == pytest.approx(
        2 * 255 / 256 * 1e9 / 2e11 + hops + beyond
    )


def test_batches_are_as_large_as_those_of_the_training_loop():
    assert (chips.MAX_CALL_STEPS, chips.MAX_CALL_CHARS) == (
        loop.MAX_CALL_STEPS,
        loop.MAX_CALL_CHARS,
    )


def test_chunks_are_as_large_as_those_of_the_backward_pass():
    assert chips.CHUNK_ROWS == backward.CHUNK_ROWS


def test_memory_per_chip_falls_to_the_replicated_state():
    config = wide_config()
    per_chip = [chip_bytes(config, 96, n) for n in (1, 64, 4096)]
    config.batch_size = 1
    state = cost.state_bytes(config, 96)
    assert per_chip == sorted(per_chip, reverse=True)
    # Beside four arrays of float32: a gradient, a copy in bfloat16, and one row.
    assert (4 * 4 + 4 + 2) / 16 * state < per_chip[-1] < 1.45 * state
