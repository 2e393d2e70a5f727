"""Measure a training step on virtual devices; compute and compile it for up to 1,024 chips.

  python launch/scaling.py [--config=tpu] [--config.KEY=VALUE ...] [--chip=v5e] [--out=DIR]

Virtual devices are threads that share the cores of this machine. They show that n devices compute
what one computes, and how many all-reduces a step has. Their time is that of all devices together,
so the rows of one device are also timed alone. The times on chips are computed by the formulas of
charlstm/planning/chips.py. --compile adds those that the compiler of TPUs estimates, which takes
minutes and `pip install -e '.[tpu]'`. Strong scaling keeps the batch; weak scaling keeps the rows
per device. Tables go to stdout, all results to DIR/scaling.json, the picture to DIR/scaling.png.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
import json
import logging

from absl import flags

from charlstm.cli import folders, options, runtime
from charlstm.errors import UserError
from charlstm.files import write_file
from charlstm.planning.chips import CHIPS

logger = logging.getLogger("charlstm.scaling")

CONFIG = options.define_config(options.DEFAULT_CONFIG.with_name("tpu.py"))
CHIP = flags.DEFINE_enum("chip", "v5e", [*CHIPS], "the accelerator to compute")
COMPILE = flags.DEFINE_boolean("compile", False, "compile for the chip, which must be a TPU")
DEVICES = flags.DEFINE_integer("devices", 64, "virtual devices, a power of two", lower_bound=1)
OUT = flags.DEFINE(
    options.LOCAL_PATH, "out", "runs/scaling", "folder for scaling.json and scaling.png"
)

MAX_DEVICES = 64  # the batch has so many rows


def check_devices(number: int) -> None:
    """Raise UserError unless the rows of the batch can be divided evenly."""
    if number & (number - 1) or number > MAX_DEVICES:
        raise UserError(f"--devices={number}: must be a power of two up to {MAX_DEVICES}")


def main() -> None:
    """Measure, estimate and draw."""
    config = options.checked_config(CONFIG)
    check_devices(DEVICES.value)
    if COMPILE.value:
        if CHIP.value == "h100":
            raise UserError("--compile: needs a TPU as --chip, not h100")
        runtime.prepare_compilers()
    out = folders.make_out(OUT.value, "scaling.json", {"virtual", "computed", "compiled"})
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES.value)
    from charlstm.bench.scaling import measure_scaling

    scaling = measure_scaling(config, CHIPS[CHIP.value], DEVICES.value, COMPILE.value)
    print(scaling)
    parts = {"computed": scaling.computed, "compiled": scaling.compiled}
    results = {"virtual": scaling.virtual} | parts
    write_file(out / "scaling.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_file(out / "scaling.png", scaling.picture)
    logger.info("all results: %s", out / "scaling.json")


if __name__ == "__main__":
    app.run(main, "--devices=4")
