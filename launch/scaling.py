"""Show how a step's time grows with devices: on virtual ones of this machine, and on paper.

  python launch/scaling.py [--config=tpu] [--config.KEY=VALUE ...] [--chip=v5e] [--out=DIR]

Virtual devices are threads of one process that share its cores: that they give what one device
gives, and how often they must meet, is true of real ones; their time is that of all their work
together, so that beside it the share of one of them is timed alone. On paper is a step of the
config on up to 1,024 chips, by charlstm.planning.cost, with one batch for all (strong
scaling) and with the same rows for each (weak scaling). All figures go to DIR/scaling.json, the
picture to DIR/scaling.png.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
import json
import logging
from typing import Any

from absl import flags

from charlstm.cli import folders, options
from charlstm.errors import UserError
from charlstm.files import write_file
from charlstm.planning import cost

logger = logging.getLogger("charlstm.scaling")

CONFIG = options.define_config(options.DEFAULT_CONFIG.with_name("tpu.py"))
CHIP = flags.DEFINE_enum("chip", "v5e", [*cost.CHIPS], "the chip on paper")
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 256, "V on paper", lower_bound=2)
DEVICES = flags.DEFINE_integer("devices", 64, "virtual devices, a power of two", lower_bound=1)
ROWS = flags.DEFINE_integer("rows", 256, "rows of each chip in weak scaling", lower_bound=1)
OUT = flags.DEFINE(
    options.LOCAL_PATH, "out", "runs/scaling", "the folder for scaling.json and scaling.png"
)

MAX_CHIPS = 1024
MAX_DEVICES = 64  # of the case's 64 rows each has one
STEPS = 7  # on virtual devices, of which the median is taken


def powers_of_two(most: int) -> list[int]:
    """Return 1, 2, 4 ... up to `most`."""
    return [2**power for power in range(most.bit_length())]


def check_devices(number: int) -> None:
    """Raise UserError unless the case's rows can be shared out evenly, as a power of two can."""
    if number & (number - 1) or number > MAX_DEVICES:
        raise UserError(f"--devices={number}: must be a power of two up to {MAX_DEVICES}")


def main() -> None:
    """Measure and draw."""
    config = options.checked_config(CONFIG)
    check_devices(DEVICES.value)
    out = folders.make_out(OUT.value, "scaling.json", {"virtual", "paper"})
    # JAX reads it when it is imported, which is further down.
    devices = f"--xla_force_host_platform_device_count={DEVICES.value}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices}"
    from charlstm.bench import scaling_report
    from charlstm.bench.scaling import Case, scale

    case = Case(batch_size=MAX_DEVICES, seq_len=32, hidden_size=128, vocab_size=96, num_layers=1)
    counts = powers_of_two(DEVICES.value)
    report: dict[str, Any] = {"virtual": {}, "paper": {}}
    for name, rows_each in (("strong", None), ("weak", 8)):
        logger.info("%s scaling on up to %d virtual devices", name, counts[-1])
        outcomes = scale(case, counts, STEPS, rows_each)
        report["virtual"][name] = [outcome._asdict() for outcome in outcomes]
        for outcome in outcomes:
            print(
                f"{name}: {outcome.num_devices} devices, {outcome.batch_size} rows, "
                f"{1000 * outcome.share_seconds:.1f} ms a step for one device's rows, "
                f"{1000 * outcome.work_seconds:.1f} for all; parameters within "
                f"{outcome.difference:.1e} of one device's; {outcome.all_reduces} all-reduces, "
                f"{outcome.in_loops} of them in loops"
            )
    chip = cost.CHIPS[CHIP.value]
    report["paper"] = scaling_report.on_paper(
        config, VOCAB_SIZE.value, chip, ROWS.value, powers_of_two(MAX_CHIPS)
    )
    for name, rows in report["paper"].items():
        for row in rows:
            seconds = ", ".join(f"{part} {1e3 * row[part]:.2f}" for part in cost.StepTime._fields)
            print(
                f"{name} on paper: {row['chips']} x {chip.name}, {row['rows']} rows: {seconds} ms"
            )
    text = json.dumps(report, indent=1, allow_nan=False)
    write_file(out / "scaling.json", text + "\n")
    about = f"{config.model.num_layers} x {config.model.hidden_size}, T = {config.seq_len}"
    write_file(out / "scaling.png", scaling_report.draw(report, f"{about}, {chip.name}"))
    logger.info("all figures: %s", out / "scaling.json")


if __name__ == "__main__":
    app.run(main, "--devices=4")
