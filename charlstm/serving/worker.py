"""The thread that runs the device for all requests."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from charlstm.filters import Settings
from charlstm.model import CharLSTM
from charlstm.runs.folder import Run
from charlstm.serving.batch import CHUNK_LEN
from charlstm.serving.batcher import Batcher, End, Task
from charlstm.serving.requests import ReadRequest, RequestError, WriteRequest

STOP_SECONDS = 10.0  # for the call that is running


class Worker:
    """Runs a Batcher in a thread of its own while there is work."""

    def __init__(self, run: Run, model: CharLSTM, params: Any, num_rows: int, max_waiting: int):
        """Compile all programs.

        Args:
          run, model, params: as load_model returns them.
          num_rows: texts that are written at the same time.
          max_waiting: tasks that may wait for it.
        """
        self.failure: Exception | None = None
        self._batcher = Batcher(run, model, params, num_rows)
        self._max_waiting = max_waiting
        self.is_stopped = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._compile()

    def _compile(self) -> None:
        ids_P = np.zeros(1, np.int32)
        requests = WriteRequest(ids_P, CHUNK_LEN, Settings(), 0, 1), ReadRequest("", ids_P)
        for request in requests:
            self._batcher.add(Task(request, lambda: None))
        while self._batcher.turn():
            pass

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def num_tasks(self) -> int:
        """The number of tasks that have not ended."""
        return len(self._batcher.tasks())

    @property
    def num_waiting(self) -> int:
        """The number of tasks that have not begun."""
        return self._batcher.num_waiting

    def submit(self, request: WriteRequest | ReadRequest, notify: Callable[[], object]) -> Task:
        """Return the task of a request; `notify` is called, in the thread, when it has an item.

        Raises:
          RequestError: if too many tasks wait, or the thread has ended.
        """
        if self.is_stopped:
            raise RequestError(503, "the server is stopping")
        if self.num_waiting >= self._max_waiting:
            raise RequestError(503, f"busy: {self._max_waiting} requests wait; try again later")
        task = Task(request, notify)
        self._batcher.add(task)
        self._wake.set()
        return task

    def take(self, task: Task) -> list[Any]:
        """Return what a task has to take; its row may then continue."""
        items = task.take()
        self._wake.set()
        return items

    def leave(self, task: Task) -> None:
        """Drop the rest of a task."""
        task.is_left = True
        self._wake.set()

    def stop(self) -> None:
        """End all tasks and the thread."""
        self.is_stopped = True
        self._wake.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        try:
            while not self.is_stopped:
                if not self._batcher.turn():
                    self._wake.wait()
                    self._wake.clear()
        except Exception as error:
            self.failure = error
        self.is_stopped = True
        for task in self._batcher.tasks():
            task.put(End("error" if self.failure else "stop"))
