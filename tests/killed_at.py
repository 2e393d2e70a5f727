"""Run launch/train.py and kill it with SIGKILL at a point of its work with files.

  python tests/killed_at.py POINT:STEP [flags of launch/train.py]

mid_save      the checkpoint of STEP is written, but not renamed yet
after_commit  right after it is renamed
mid_delete    half of the files of the checkpoint of STEP are deleted
before_log    right before the record after that of STEP is appended to metrics.jsonl
torn_log      after a part of it is appended
after_log     right after it is appended

Audit events of Python (sys.addaudithook) trigger the kill.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent.parent / "launch"


class Killer:
    """An audit hook that kills the process at a point."""

    def __init__(self, point, step):
        self.point, self.step = point, step
        self.is_armed = False  # the next event of any kind kills
        self.num_removed = None  # files of the checkpoint that is being deleted

    def __call__(self, event, args):
        if self.is_armed:
            self.is_armed = False  # because truncate is an event too
            if self.point == "torn_log":
                os.truncate(self.log, os.path.getsize(self.log) - 20)
            self.kill()
        if event == "os.rename":
            source, target = (os.fsdecode(os.fspath(path)) for path in args[:2])
            if "orbax-checkpoint-tmp" in source and Path(target).name == self.step:
                if self.point == "mid_save":
                    self.kill()
                self.is_armed = self.point == "after_commit"
        if event == "open" and "a" in (args[1] or "") and str(args[0]).endswith("metrics.jsonl"):
            self.log = os.fspath(args[0])
            if self.last_step() == self.step:
                if self.point == "before_log":
                    self.kill()
                self.is_armed = self.point in ("torn_log", "after_log")
        if event == "shutil.rmtree" and self.point == "mid_delete":
            path = Path(os.fsdecode(os.fspath(args[0])))
            if path.name == "trash" and (path.parent / self.step).exists():
                self.num_removed = 0
        if event == "os.remove" and self.num_removed is not None:
            self.num_removed += 1
            if self.num_removed == 5:
                self.kill()

    @staticmethod
    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def last_step(self):
        path = Path(self.log)
        lines = path.read_text().splitlines() if path.exists() else []
        return lines[-1].split('"step": ')[1].split(",")[0] if lines else None


if __name__ == "__main__":
    point, step = sys.argv[1].split(":")
    script = str(LAUNCH / "train.py")
    sys.argv = [script, *sys.argv[2:]]
    sys.path[0] = str(LAUNCH)
    sys.addaudithook(Killer(point, step))
    runpy.run_path(script, run_name="__main__")
