"""Runs launch/train.py and kills it, as kill -9 does, at a named point of its work with files.

  python tests/killed_at.py POINT:STEP [flags of launch/train.py]

mid_save      a checkpoint is written, but has not got its name yet
after_commit  it has its name, and nothing has been done since
mid_delete    half the files of an older checkpoint are deleted
before_log    a record is written, but metrics.jsonl is still the old one
after_log     metrics.jsonl is the new one, and nothing has been done since

The points are events that Python itself tells of (sys.addaudithook): the package has no part in it.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent.parent / "launch"


class Killer:
    """An audit hook that ends the process at a point."""

    def __init__(self, point, step):
        self.point, self.step = point, step
        self.is_armed = False  # the next event of any kind is the end
        self.num_removed = None  # since the deletion of a checkpoint began

    def __call__(self, event, args):
        if self.is_armed:
            self.kill()
        if event == "os.rename":
            source, target = (os.fsdecode(os.fspath(path)) for path in args[:2])
            is_commit = "orbax-checkpoint-tmp" in source and Path(target).name == self.step
            is_log = target.endswith("metrics.jsonl") and self.last_step(source) == self.step
            if (self.point == "mid_save" and is_commit) or (self.point == "before_log" and is_log):
                self.kill()
            if (self.point == "after_commit" and is_commit) or (
                self.point == "after_log" and is_log
            ):
                self.is_armed = True
        if event == "shutil.rmtree" and self.point == "mid_delete":
            path = Path(os.fsdecode(os.fspath(args[0])))
            if path.name == "trash" and (path.parent / self.step).exists():
                self.num_removed = 0
        if event == "os.remove" and self.num_removed is not None:
            self.num_removed += 1
            if self.num_removed == 5:
                self.kill()

    def kill(self):
        self.is_armed = False  # since this is an event, too
        os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def last_step(path):
        last_line = Path(path).read_text().splitlines()[-1]
        return last_line.split('"step": ')[1].split(",")[0]


if __name__ == "__main__":
    point, step = sys.argv[1].split(":")
    script = str(LAUNCH / "train.py")
    sys.argv = [script, *sys.argv[2:]]
    sys.path[0] = str(LAUNCH)
    sys.addaudithook(Killer(point, step))
    runpy.run_path(script, run_name="__main__")
