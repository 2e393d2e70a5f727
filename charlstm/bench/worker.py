"""The process of one contender of bench.py.

Libraries in one process would fight over threads, and peak memory is a figure of a process. This
one reads a JSON object a line from stdin and answers each with one on stdout; see `serve`.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from charlstm.bench.cases import Call, Case, Made, most_memory, timed
from charlstm.bench.ours import make_jax, make_matmul
from charlstm.bench.peers import learn_tutorial, make_keras, make_torch, use_faster_threads
from charlstm.bench.quality import score
from charlstm.cli.runtime import keep_memory

CONTENDERS: dict[str, Callable[[Case], Made]] = {
    "charlstm": partial(make_jax, recurrence="fused"),
    "flax": partial(make_jax, recurrence="flax"),
    "torch": make_torch,
    "keras": make_keras,
    "matmul": make_matmul,
}
IMPORTS = {"charlstm": "charlstm.model", "flax": "charlstm.model", "matmul": "jax"}


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    try:
        # getrusage would count the parent's memory too, which a child begins with.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return most_memory(resource.getrusage(resource.RUSAGE_SELF))


class Server:
    """The requests that a contender answers; each gives what goes back as JSON."""

    def __init__(self, name: str):
        self._name = name
        self._sizes: dict[str, Any] = {}
        self._built: dict[str, Any] = {}
        self._call: Call = lambda: math.nan
        self._calls = 1

    def ready(self) -> dict[str, Any]:
        """Import the library, in the surroundings of a program of its kind."""
        if self._name in ("charlstm", "flax"):
            keep_memory()
        __import__(IMPORTS.get(self._name, self._name))
        return {}

    def build(self, **sizes: Any) -> dict[str, Any]:
        """Build the case of these sizes, unless it is there already, and do its work once."""
        if sizes != self._sizes:
            self._call, given = CONTENDERS[self._name](Case(**sizes))
            self._sizes, self._built = sizes, {"given": given, "value": self._call()}
        return self._built

    def calibrate(self, repeat_seconds: float) -> dict[str, Any]:
        """Warm up, and find out how many calls take `repeat_seconds`."""
        given = use_faster_threads(self._call) if self._name == "torch" else ""
        quickest = min(timed(self._call) for _ in range(3))
        self._calls = max(1, math.ceil(repeat_seconds / quickest))
        return {"given": given}

    def time(self) -> dict[str, Any]:
        """Measure one repeat."""
        start = time.perf_counter()
        for _ in range(self._calls):
            self._call()
        return {"seconds": (time.perf_counter() - start) / self._calls}

    def peak(self) -> dict[str, Any]:
        """Tell the memory."""
        return {"peak_bytes": peak_bytes()}

    def learn(self, **arguments: Any) -> dict[str, Any]:
        """Learn by the tutorial's recipe, for 'quality'."""
        return learn_tutorial(**arguments)

    def score(self, **arguments: Any) -> dict[str, Any]:
        """Score what a run has learnt, for 'quality'."""
        return score(**arguments)


def serve(name: str) -> None:
    """Answer requests {"do": NAME-OF-METHOD, ...its arguments} until stdin ends."""
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    server = Server(name)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(server, request.pop("do"))(**request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
