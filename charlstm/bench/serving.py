"""A load on launch/serve.py: readers in this process, over HTTP on the loopback interface."""

import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from charlstm.cli import signals, streams
from charlstm.errors import RunError

# Of each request. The server limits requests per second, thus a request is not short.
PROMPT_LEN, LEAST_LENGTH = 40, 1000
START_SECONDS = 300  # for the server to load and compile


class Answer(NamedTuple):
    """When and how much a server wrote for one request."""

    first_seconds: float  # from the request to the first characters
    characters: int


def measure_serving(
    workdir: Path, numbers_of_readers: tuple[int, ...], seconds: float, num_requests: int
) -> list[dict[str, Any]]:
    """Return the speed and the memory of launch/serve.py.

    Each reader sends a request, reads its text to the end, and sends the next one.

    Args:
      workdir: the run folder.
      numbers_of_readers: at the same time, one result for each number.
      seconds: of each measurement.
      num_requests: of the last measurement, with the last number of readers.

    Raises:
      RunError: if the server does not start, or answers a request with an error.
    """
    results = []
    with started_server(workdir) as (process, address):
        prompts = read_prompts(workdir)
        ask(address, prompts[0], seed=0)  # the first request loads modules

        def measure(name: str, num_readers: int, goes_on: Callable[[int, float], bool]) -> None:
            before, begin = resident_mib(process.pid), time.perf_counter()

            def read(reader: int) -> list[Answer]:
                answers: list[Answer] = []
                while goes_on(len(answers), time.perf_counter() - begin):
                    seed = reader + num_readers * len(answers)
                    answers.append(ask(address, prompts[seed % len(prompts)], seed))
                return answers

            with ThreadPoolExecutor(num_readers) as pool:
                answers = [answer for each in pool.map(read, range(num_readers)) for answer in each]
            elapsed = time.perf_counter() - begin
            first_ms = [1000 * answer.first_seconds for answer in answers]
            results.append(
                {
                    "readers": name,
                    "requests": len(answers),
                    "first_ms": float(np.median(first_ms)),
                    "first_ms_95_percent": float(np.quantile(first_ms, 0.95)),
                    "first_ms_most": max(first_ms),
                    "chars_per_second": sum(answer.characters for answer in answers) / elapsed,
                    "mib_before": before,
                    "mib_after": resident_mib(process.pid),
                }
            )

        for number in numbers_of_readers:
            measure(str(number), number, lambda count, elapsed: elapsed < seconds)
        share = -(-num_requests // number)
        measure(f"{number}, {share} requests each", number, lambda count, elapsed: count < share)
    return results


@contextmanager
def started_server(workdir: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """Yield the process of a server for a run, and its HOST:PORT."""
    command = [sys.executable, f"{streams.LAUNCH}/serve.py", f"--workdir={workdir}", "--port=0"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        signals.cleanups.append(process.kill)
        timer = threading.Timer(START_SECONDS, process.kill)
        timer.start()
        try:
            line = process.stdout.readline() if process.stdout else ""
            timer.cancel()
            if "http://" not in line:
                process.wait()
                errors.seek(0)
                last_line = (errors.read().strip().splitlines() or [""])[-1]
                raise RunError(f"launch/serve.py did not start: {last_line}")
            yield process, line.strip().partition("http://")[2].rstrip("/")
        finally:
            timer.cancel()
            process.kill()


def read_prompts(workdir: Path) -> list[str]:
    """Return the beginnings of the passages of a run."""
    prompts = json.loads((workdir / "prompts.json").read_text(encoding="utf-8"))
    return [prompt[:PROMPT_LEN] for prompt in prompts]


def ask(address: str, prompt: str, seed: int) -> Answer:
    """Send one request and read all events of the answer."""
    length = LEAST_LENGTH + 37 * seed % 2000  # so that readers do not all begin at once
    body = json.dumps({"text": prompt, "length": length, "seed": seed})
    begin, first, characters = time.perf_counter(), 0.0, 0
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("POST", "/api/write", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RunError(f"launch/serve.py answers {answer.status}: {answer.read()!r}")
    for line in answer:
        if line.startswith(b"data: ") and (text := json.loads(line[6:]).get("text")):
            first = first or time.perf_counter() - begin
            characters += len(text)
    connection.close()
    return Answer(first, characters)


def resident_mib(process_id: int) -> float | None:
    """Return the memory of a process in MiB, None where /proc does not say."""
    try:
        status = Path(f"/proc/{process_id}/status").read_text()
    except OSError:
        return None
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 2**10
