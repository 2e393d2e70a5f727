"""Estimate what a run costs before it starts, or propose settings for a time.

  python launch/plan.py [--config=NAME] [--config.KEY=VALUE ...] [--minutes=M] [--chips=v5e:256]

Takes the flags of train.py, trains nothing and writes to no run folder. It measures for half a
minute by executing each stage of a run briefly. --minutes proposes width, streams, window, steps,
dropout and learning rate for a command of that duration, start-up and evaluations included, and
prints the command of train.py; charlstm/planning/README.md explains the rule. --chips adds the time
of a step on accelerators, by the formulas of charlstm/planning/chips.py. --seconds=0 measures
nothing:

  python launch/plan.py --config=tpu --chips=v5e:16 --seconds=0

--compile compiles the training step, the evaluation step and the sampler for TPUs or GPUs, and
prints what the compiler reports of each. It needs no TPU or GPU. On Linux on x86-64,
`pip install -e '.[tpu]'` or `'.[cuda-compiler]'` installs the compiler. --largest_batch also finds
the largest batch that fits, by compiling about four more training steps. Wide models take minutes:

  python launch/plan.py --config=tpu --compile=v5e:4x4
  python launch/plan.py --config=gpu --compile=h100:8 --largest_batch
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
import json
import re

from absl import flags

from charlstm.cli import options, runtime
from charlstm.errors import UserError
from charlstm.planning.chips import CHIPS, Chip, check_rows

CONFIG = options.define_config()
MINUTES = flags.DEFINE_float("minutes", None, "propose settings for a command of this duration")
ACCELERATORS = flags.DEFINE_string(
    "chips", "", f"NAME:NUMBER of accelerators that share the batch; names: {', '.join(CHIPS)}"
)
SECONDS = flags.DEFINE_float(
    "seconds", 6.0, "how long to time training steps; 0 measures nothing", 0.0, 3600.0
)
COMPILE = flags.DEFINE_string(
    "compile", "", "compile for TPUs, such as v5e:4x4, v4:2x2x1 or v6e:1x1, or GPUs, such as h100:8"
)
LARGEST_BATCH = flags.DEFINE_boolean(
    "largest_batch", False, "with --compile: also find the largest batch that fits"
)
JSON = flags.DEFINE_boolean("json", False, "print one JSON object")


def parse_chips(word: str) -> tuple[Chip, int] | None:
    """Return the chip and the number of a word such as v5e:256, None for an empty word."""
    if not word:
        return None
    name, _, number = word.partition(":")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d{0,5}", number):
        raise UserError(
            f"--chips={word}: must be NAME:NUMBER, such as v5e:256; names: {', '.join(CHIPS)}"
        )
    return CHIPS[name], int(number)


def main() -> None:
    """Print the costs of the config, or of the settings that are proposed for --minutes."""
    config = options.checked_config(CONFIG)
    chips, minutes, seconds = parse_chips(ACCELERATORS.value), MINUTES.value, SECONDS.value
    if chips:
        check_rows(config, *chips)
    options.check_minutes(minutes)
    if config.init_from:
        raise UserError(
            f"config.init_from={config.init_from}: plan.py does not read it; leave it out, and "
            "give the settings of its model by config.model"
        )
    if minutes and not seconds:
        raise UserError("--seconds=0: --minutes has to time steps; leave --seconds out")
    if topology := COMPILE.value:
        if minutes or chips:
            raise UserError(f"--compile={topology}: leave out --minutes and --chips")
        runtime.prepare_compilers()
    elif LARGEST_BATCH.value:
        raise UserError("--largest_batch: needs --compile=TOPOLOGY")
    from charlstm import planning  # its functions import JAX

    if topology:
        compiled = planning.compile_for(config, topology, find_largest=LARGEST_BATCH.value)
        print(json.dumps(compiled.costs, allow_nan=False) if JSON.value else compiled)
        return
    if minutes:
        result = planning.plan(config, minutes, timing_seconds=seconds, chips=chips)
        command = options.train_command(CONFIG, result.settings)
    else:
        result = planning.estimate(config, timing_seconds=seconds, chips=chips)
        command = ""
    if JSON.value:
        print(json.dumps(result.costs | ({"command": command} if command else {}), allow_nan=False))
        return
    print(result)
    if command:
        print(f"try: {command}")


if __name__ == "__main__":
    app.run(main, "--config.data.path=book.txt --minutes=10")
