"""Tell what a run takes before it is made: memory, operations, time; or which settings fit a time.

  python launch/plan.py [--config=NAME] [--config.KEY=VALUE ...] [--minutes=M] [--chips=v5e:256]

Takes what train.py takes, trains nothing and writes into no run folder. What it measures, it
measures in half a minute by doing each part of a run briefly. --minutes proposes width, streams,
window, steps, dropout and learning rate for the best text in that time, start-up and evaluations
included, as a command for train.py; its rule is in charlstm.planning.rules. --chips puts a step on
accelerators on paper, by the formulae of charlstm.planning.cost; --seconds=0 measures nothing:

  python launch/plan.py --config=tpu --chips=v5e:16 --seconds=0
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
import json
import logging
import re
from typing import Any

from absl import flags

from charlstm.cli import options
from charlstm.errors import UserError, printable
from charlstm.planning import cost

logger = logging.getLogger("charlstm.plan")

CONFIG = options.define_config()
MINUTES = flags.DEFINE_float("minutes", None, "propose settings for a command of so many minutes")
CHIPS = flags.DEFINE_string(
    "chips", "", f"NAME:NUMBER of chips to put on paper; names: {', '.join(cost.CHIPS)}"
)
SECONDS = flags.DEFINE_float(
    "seconds", 6.0, "how long to time steps; 0: count on paper only", 0.0, 3600.0
)
JSON = flags.DEFINE_boolean("json", False, "print one JSON object")


def parse_chips(word: str, batch_size: int) -> tuple[cost.Chip, int] | None:
    """Return the chip and the number that a word such as v5e:256 names, None for none."""
    if not word:
        return None
    name, _, number = word.partition(":")
    if name not in cost.CHIPS or not re.fullmatch(r"[1-9]\d{0,5}", number):
        raise UserError(
            f"--chips={word}: must be NAME:NUMBER, such as v5e:256; names: {', '.join(cost.CHIPS)}"
        )
    if int(number) > batch_size:
        raise UserError(
            f"--chips={word}: config.batch_size={batch_size} has no row for each of them; "
            "raise it, or name fewer chips"
        )
    return cost.CHIPS[name], int(number)


def check_minutes(minutes: float | None, seconds: float) -> None:
    """Raise UserError for a time that is none, or is not to be timed."""
    app.check_minutes(minutes)
    if minutes and not seconds:
        raise UserError("--seconds=0: --minutes has to time steps; leave --seconds out")


def main() -> int:
    """Plan as the flags say."""
    config = options.checked_config(CONFIG)
    chips = parse_chips(CHIPS.value, config.batch_size)
    check_minutes(MINUTES.value, SECONDS.value)
    from charlstm.planning import plan

    settings: dict[str, Any] = {}
    if MINUTES.value:
        about, settings = plan.propose(config, 60 * MINUTES.value, SECONDS.value)
        about["command"] = options.train_command(CONFIG, settings)
    else:
        about = plan.describe(config, SECONDS.value)
    if chips:
        about["on paper"] = plan.on_paper(config, about["vocabulary"], *chips)
    if JSON.value:
        print(json.dumps(about, allow_nan=False))
    else:
        print(printable(plan.table(about)))
    return 0


if __name__ == "__main__":
    app.run(main, "--config.data.path=book.txt --minutes=10")
