"""Train a character model, or go on with a run.

  python launch/train.py [--config=NAME or FILE] [--workdir=DIR] [--config.KEY=VALUE ...]

Without flags: configs/default.py on Dracula, in runs/default. The settings and their meaning are
in charlstm/config.py. The same command again goes on where it stopped.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

import app
from absl import flags

CONFIG = app.define_config()
flags.adopt_module_key_flags(app)  # so that --help lists --config
WORKDIR = flags.DEFINE_string("workdir", "", "the run folder; runs/NAME-OF-CONFIG if not given")


class StopSignal:
    """Becomes true at SIGTERM or Ctrl-C; a second one ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._catch)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not by logging, which this may have interrupted; and the bar hides the cursor.
        cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        os.write(2, f"{cursor}stopping once the step is saved; another signal ends now\n".encode())

    def __call__(self) -> bool:
        """Return whether a signal has come."""
        return self.number != 0


def main() -> int:
    """Train as the flags say; return the exit code."""
    config = app.checked_config(CONFIG)
    stop = StopSignal()
    from charlstm.train import train  # JAX takes a second to load, mistakes should not

    workdir = WORKDIR.value or str(Path("runs") / app.config_name(CONFIG))
    finished = train(config, workdir, should_stop=stop)
    return 0 if finished else 128 + stop.number


if __name__ == "__main__":
    app.run(main)
