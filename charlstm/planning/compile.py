"""Compile the programs of a run for TPUs and GPUs on a machine without any.

libtpu and JAX's CUDA plugin contain the compilers. What is returned is a compiler's own account of
the programs; nothing runs.
"""

import logging
import re
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from charlstm.data.batches import evaluation_batches
from charlstm.errors import RunError, UserError, one_line
from charlstm.filters import Settings
from charlstm.model import zero_carry
from charlstm.optim import make_optimizer, make_schedule
from charlstm.parallel.sharding import by_rows, init_sharded, make_mesh, replicated
from charlstm.planning import cost, hlo
from charlstm.planning.chips import CHIPS
from charlstm.planning.memory import abstract_batch, find_largest
from charlstm.sampling import READERS, Draw, initial_state
from charlstm.streaming import CHUNK_LEN, compiled_generate_chunk, with_rows
from charlstm.training.loop import compile_train_steps, max_steps_per_call
from charlstm.training.setup import Setup
from charlstm.training.validation import compile_eval_step

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = re.compile(r"\(?([\d.]+)([KMGT])\)? exceeds available HBM \(([\d.]+)([KMGT])\)")
UNITS = {unit: 2 ** (10 * power) for power, unit in enumerate("KMGT", 1)}


class Lowered(NamedTuple):
    """A program of a run, not yet compiled."""

    program: Any  # jax.stages.Lowered
    outer_loops: int  # the number of loops around all steps, such as that over training steps


def for_topology(setup: Setup, config: ConfigDict, devices: list[Any]) -> Setup:
    """Return `setup` with `config` in place of its own, on a mesh of `devices`.

    Raises:
      UserError: if the devices cannot share the batch, or the text is too short to evaluate.
    """
    mesh = make_mesh(config, devices)
    fields = config.model.to_dict() | {"num_shards": mesh.size}
    val_batches = setup.val_batches and evaluation_batches(setup.val_batches.ids_M, config)
    return setup._replace(
        run=setup.run._replace(config=config),
        mesh=mesh,
        model=setup.model.clone(**fields),
        val_batches=val_batches,
        num_steps=config.num_steps or setup.num_steps,
    )


def lower_train_steps(setup: Setup) -> tuple[Lowered, Any]:
    """Return the program of training steps on the devices of `setup.mesh`, and their parameters."""
    config, mesh = setup.run.config, setup.mesh
    optimizer = make_optimizer(config, make_schedule(config, setup.num_steps))
    key = setup.run.key(config.seed)
    state, _ = init_sharded(setup.model, optimizer, key, config.batch_size, mesh)
    batches = abstract_batch(setup, config.batch_size, max_steps_per_call(setup))
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    train_steps: Any = compile_train_steps(setup, optimizer, state)
    return Lowered(train_steps.lower(state, batches, count), 1), state.params


def programs(setup: Setup) -> dict[str, Lowered]:
    """Return the programs that training calls, on the devices of `setup.mesh`."""
    mesh = setup.mesh
    train_steps, params = lower_train_steps(setup)
    found = {"training step": train_steps}
    if setup.val_batches:
        rows = setup.val_batches.batch_size
        sharding = by_rows(mesh, rows)
        carry = jax.tree.map(
            lambda leaf: leaf.update(sharding=sharding),
            jax.eval_shape(partial(zero_carry, setup.model, rows)),
        )
        eval_step: Any = compile_eval_step(setup)
        lowered = eval_step.lower(params, carry, abstract_batch(setup, rows))
        found["evaluation step"] = Lowered(lowered, 0)
    return found | {"sampler": Lowered(lower_sampler(setup, params), 1)}


def lower_sampler(setup: Setup, params: Any) -> Any:
    """Return the program that continues one prompt by at most CHUNK_LEN characters."""
    config = setup.run.config
    chosen = config.sample.to_dict()
    method, _ = chosen.pop("method"), chosen.pop("length")
    settings = Settings(**chosen)
    prompt_BP = np.zeros((1, config.seq_len), np.int32)
    state, _ = initial_state(setup.model, method, config.seq_len, prompt_BP, settings.penalizes)
    given_BT = np.zeros((1, CHUNK_LEN), np.int32)
    number, draw = np.int32(0), Draw(setup.run.key(config.seed), with_rows(settings, 1))
    sharding = SingleDeviceSharding(setup.mesh.devices.flat[0])
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=sharding),
        (params, state, given_BT, number, number, draw),
    )
    return compiled_generate_chunk.lower(setup.model, READERS[method], *arguments)


def compile_costs(setup: Setup, topology: str) -> dict[str, Any]:
    """Compile the programs of a run for the devices of `setup.mesh`; return their costs."""
    config = setup.run.config
    chip = CHIPS.get(topology.partition(":")[0])
    hbm_bytes = chip.memory if chip else None
    costs = {}
    for name, lowered in programs(setup).items():
        logger.info("compiling the %s", name)
        costs[name] = program_costs(lowered, config.model.hidden_size, hbm_bytes)
    return {
        "topology": topology,
        "device_kind": setup.mesh.devices.flat[0].device_kind,
        "devices": setup.mesh.size,
        "hosts": len({device.process_index for device in setup.mesh.devices.flat}),
        "rows_per_device": config.batch_size // setup.mesh.size,
        "text": setup.run.text.source,
        "vocabulary": setup.model.vocab_size,
        "layers": config.model.num_layers,
        "hidden_size": config.model.hidden_size,
        "dtype": config.model.dtype,
        "batch_size": config.batch_size,
        "seq_len": config.seq_len,
        "parameters": cost.count_params(config, setup.model.vocab_size),
        "programs": costs,
    }


def compile_largest_batch(setup: Setup, topology: str, step: dict[str, Any]) -> dict[str, int]:
    """Find by compiling how many rows fit a device of `setup.mesh`; return the largest batch.

    `step` has the costs of the training step of `setup`, as program_costs returns them.

    Raises:
      UserError: if the memory of these devices is unknown, or not even one row fits.
      RunError: if the compiler fails.
    """
    chip, size = CHIPS.get(topology.partition(":")[0]), setup.mesh.size
    if not chip:
        raise UserError(f"--compile={topology}: the memory of this chip is unknown")
    config = setup.run.config.copy_and_resolve_references()
    first = config.batch_size // size

    def needed_bytes(rows: int) -> float:
        costs = step
        if rows != first:
            config.batch_size = rows * size
            resized = for_topology(setup, config, list(setup.mesh.devices.flat))
            logger.info("compiling the training step with %d rows per device", rows)
            lowered, _ = lower_train_steps(resized)
            costs = program_costs(lowered, config.model.hidden_size, chip.memory)
        if "needed_bytes" in costs:
            return costs["needed_bytes"]
        # The compiler refuses programs that need a little less than all memory.
        return max(costs["temporary_bytes"], 1.01 * chip.memory)

    fits, refused = find_largest(needed_bytes, chip.memory, first)
    if not fits:
        raise UserError(f"--compile={topology}: a batch of one row per device does not fit")
    return {"batch_size": fits * size, "rows_per_device": fits, "refused_rows": int(refused)}


def program_costs(lowered: Lowered, hidden_size: int, hbm_bytes: float | None) -> dict[str, Any]:
    """Compile a program; return its costs on each device as the compiler reports them.

    'needed_bytes' is the sum of arguments, outputs that replace none, temporaries and code. For a
    program that the compiler refuses because its temporaries do not fit, only these are known.

    Raises:
      RunError: if the compiler fails for another reason.
    """
    begin = time.perf_counter()
    try:
        compiled = lowered.program.compile()
        seconds = time.perf_counter() - begin
        memory = compiled.memory_analysis()
        program = hlo.parse(compiled.as_text())
    except jax.errors.JaxRuntimeError as error:
        if not (found := OUT_OF_MEMORY.search(str(error))):
            raise RunError(f"the compiler fails: {one_line(error)}") from error
        needed, available = (float(found[place]) * UNITS[found[place + 1]] for place in (1, 3))
        return {"fits": False, "temporary_bytes": needed, "hbm_bytes": available}
    new_bytes = memory.output_size_in_bytes - memory.alias_size_in_bytes
    held_bytes = memory.argument_size_in_bytes + memory.generated_code_size_in_bytes
    needed_bytes = held_bytes + new_bytes + memory.temp_size_in_bytes
    costs = {
        "fits": hbm_bytes is None or needed_bytes <= hbm_bytes,
        "hbm_bytes": hbm_bytes,
        "needed_bytes": needed_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": seconds,
        "collectives": described_collectives(program, lowered.outer_loops),
    }
    if (counts := compiled.cost_analysis()) is None:  # as for GPUs
        return costs | {"operations_in_loops": described_operations(program)}
    return costs | {
        "peak_bytes": memory.peak_memory_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "flops": counts["flops"],
        "bytes_accessed": counts["bytes accessed"],
        "estimated_cycles": hlo.estimated_cycles(program),
        "kernels_in_loops": described_kernels(program, hidden_size),
    }


def described_collectives(program: hlo.Program, outer_loops: int) -> list[dict[str, Any]]:
    """Return the collectives of a program, each as an object of JSON."""
    return [
        {
            "kind": one.opcode,
            "bytes": one.num_bytes,
            "arrays": len(one.arrays),
            "dtypes": sorted({array.dtype for array in one.arrays}),
            "in_loop": one.loops > outer_loops,
        }
        for one in hlo.collectives(program)
    ]


def described_operations(program: hlo.Program) -> list[dict[str, Any]]:
    """Return how many operations each iteration of the loops over time has."""
    return [
        {"pass": direction(loop), "operations": loop.operations}
        for loop in hlo.loops(program)
        if loop.is_innermost
    ]


def described_kernels(program: hlo.Program, hidden_size: int) -> list[dict[str, Any]]:
    """Return the memory of the recurrent kernels that the loops over time of a program read."""
    return [
        {
            "pass": direction(loop),
            "dtype": kernel.dtype,
            "bytes": kernel.num_bytes,
            "memory": kernel.memory,
            "on_chip": kernel.memory in hlo.ON_CHIP,
        }
        for loop in hlo.loops(program)
        if loop.is_innermost
        for kernel in wide_kernels(loop, hidden_size)
    ]


def direction(loop: hlo.Loop) -> str:
    """Return 'forward' or 'backward'."""
    return "backward" if "transpose(" in loop.op_name else "forward"


def wide_kernels(loop: hlo.Loop, hidden_size: int) -> list[hlo.Array]:
    """Return the arrays [H, 4H] and [4H, H] that all iterations of a loop read.

    They are the recurrent kernels, and in the sampler also the input kernels of upper layers.
    """
    shapes = (hidden_size, 4 * hidden_size), (4 * hidden_size, hidden_size)
    return [
        array
        for array in loop.constants
        if tuple(size for size in array.shape if size > 1) in shapes
    ]
