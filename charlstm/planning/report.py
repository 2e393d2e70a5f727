"""Tables of the costs of a run."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from charlstm.planning.chips import StepTime
from charlstm.planning.timing import CommandTimes
from charlstm.system.tables import plain_text


def cost_table(costs: Mapping[str, Any]) -> str:
    """Return a table with a row per cost; the keys are those of `launch/plan.py --json`."""
    rows = _counted(costs)
    if "command_seconds" in costs:
        rows |= _measured(costs)
    if "accelerator" in costs:
        rows |= _accelerator(costs["accelerator"])
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, value)
    return plain_text(table)


def compiled_table(costs: Mapping[str, Any]) -> str:
    """Return a table with a row per cost of each program that was compiled."""
    hosts = f"{costs['hosts']:,} host{'s' if costs['hosts'] > 1 else ''}"
    table = Table.grid(padding=(0, 2))
    rows = {
        "topology": costs["topology"],
        "devices": f"{costs['devices']:,} x {costs['device_kind']} on {hosts}",
        "text": costs["text"],
        "vocabulary": f"{costs['vocabulary']:,}",
        "model": f"{costs['layers']} x {costs['hidden_size']} LSTM, {costs['dtype']}",
        "parameters": f"{costs['parameters']:,}",
        "batch": f"{costs['batch_size']:,} x {costs['seq_len']:,}",
        "rows per device": f"{costs['rows_per_device']:,}",
    }
    if "largest_batch" in costs:
        largest = costs["largest_batch"]
        rows["largest batch that fits"] = (
            f"{largest['batch_size']:,}, {largest['rows_per_device']:,} rows per device; "
            f"{largest['refused_rows']:,} do not fit"
        )
    for name, value in rows.items():
        table.add_row(name, value)
    for program, found in costs["programs"].items():
        table.add_row(f"{program}, per device")
        for name, value in _compiled(found).items():
            table.add_row(f"- {name}", value)
    return plain_text(table)


def _compiled(found: Mapping[str, Any]) -> dict[str, str]:
    size = f" of {_size(found['hbm_bytes'])}" if found["hbm_bytes"] else ""
    fits = f"{size}, {'fits' if found['fits'] else 'does not fit'}"
    if "needed_bytes" not in found:
        return {"temporaries": f"{_size(found['temporary_bytes'])}{fits}"}
    rows = {
        "memory": f"{_size(found['needed_bytes'])}{fits}",
        "arguments": _size(found["argument_bytes"]),
        "outputs": f"{_size(found['output_bytes'])}, of which {_size(found['aliased_bytes'])} "
        "replace arguments",
        "temporaries": _size(found["temporary_bytes"]),
    }
    if "operations_in_loops" in found:  # on a GPU
        loops = found["operations_in_loops"]
        rows["operations per iteration of loops"] = "; ".join(map(_operations, loops)) or "no loops"
    else:
        kernels = found["kernels_in_loops"]
        rows |= {
            "program": _size(found["code_bytes"]),
            "peak, by the compiler": _size(found["peak_bytes"]),
            "operations, each loop body once": f"{found['flops']:,.0f}",
            "bytes read and written, likewise": f"{found['bytes_accessed']:,.0f}",
            "cycles of one step, estimated": f"{found['estimated_cycles']:,}",
            "kernels [H, 4H] in loops": "; ".join(map(_kernel, kernels)) or "none found",
        }
    return rows | {
        "collectives": "; ".join(map(_collective, found["collectives"])) or "none",
        "compile time": _duration(found["compile_seconds"]),
    }


def _operations(loop: Mapping[str, Any]) -> str:
    return f"{loop['pass']} {loop['operations']}"


def _collective(one: Mapping[str, Any]) -> str:
    where = "in a loop over time" if one["in_loop"] else "outside loops over time"
    arrays = f"{one['arrays']} array{'s' if one['arrays'] > 1 else ''}"
    return f"{one['kind']} of {arrays}, {_size(one['bytes'])} {'+'.join(one['dtypes'])}, {where}"


def _kernel(kernel: Mapping[str, Any]) -> str:
    return f"{kernel['pass']} {_size(kernel['bytes'])} {kernel['dtype']} in {kernel['memory']}"


def _counted(costs: Mapping[str, Any]) -> dict[str, str]:
    return {
        "text": costs["text"],
        "training characters": f"{costs['training_characters']:,}",
        "vocabulary": f"{costs['vocabulary']:,}",
        "model": f"{costs['layers']} x {costs['hidden_size']} LSTM ({costs['recurrence']})",
        "parameters": f"{costs['parameters']:,}",
        "flops per character": f"{costs['forward_flops_per_char']:,}",
        "flops per trained character": f"{costs['training_flops_per_char']:,}",
        "activations": _size(costs["activation_bytes"]),
        "gradient": _size(costs["gradient_bytes"]),
        "optimizer state": _size(costs["optimizer_bytes"]),
        "checkpoint": _size(costs["checkpoint_bytes"]),
        "batch": f"{costs['batch_size']:,} x {costs['seq_len']:,}",
        "steps": f"{costs['steps']:,}",
        "steps per epoch": f"{costs['steps_per_epoch']:,}",
    }


def _measured(costs: Mapping[str, Any]) -> dict[str, str]:
    seconds = costs["command_seconds"]
    flops = costs["training_flops_per_char"] * costs["chars_per_second"]
    return {
        "devices": costs["devices"],
        "memory of a device": _size(costs["memory_bytes"]),
        "memory of a step": _size(costs["compiled_step_bytes"]),
        "largest batch that fits": f"{costs['largest_batch']:,}",
        "step": _duration(costs["step_seconds"]),
        "characters per second": f"{costs['chars_per_second']:,.0f}",
        "Gflop per second": f"{flops / 1e9:,.0f}",
        "epoch": _duration(costs["epoch_seconds"]),
        "whole command": _duration(seconds["total"]),
    } | {f"- {name}": _duration(seconds[name]) for name in CommandTimes._fields}


def _accelerator(costs: Mapping[str, Any]) -> dict[str, str]:
    name = f"{costs['chips']:,} x {costs['chip']}"
    fits = "fits" if costs["fits"] else "does not fit"
    return {
        f"step on {name}, by formula": _duration(costs["step_seconds"]),
        **{
            f"- {part.replace('_', '-')}": _duration(costs["seconds"][part])
            for part in StepTime._fields
        },
        f"characters per second on {name}": f"{costs['chars_per_second']:,.0f}",
        f"memory per {costs['chip']}": f"{_size(costs['bytes_per_chip'])}, {fits}",
        f"source of {costs['chip']}": costs["source"],
    }


def _size(num_bytes: float) -> str:
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:,.1f} GiB"
    if num_bytes < 2**17:
        return f"{num_bytes:,.0f} bytes"
    return f"{num_bytes / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.2f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
