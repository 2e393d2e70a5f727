"""Bookkeeping of the readers of one batch: which row is whose, and what a turn of work is."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from charlstm.evaluation.surprise import CHUNK_LEN as SURPRISE_LEN
from charlstm.evaluation.surprise import Predictions, predict_pieces
from charlstm.filters import Settings
from charlstm.keys import derive_key
from charlstm.model import CharLSTM
from charlstm.runs.folder import Run
from charlstm.sampling import PAD_ID
from charlstm.serving.batch import (
    CHUNK_LEN,
    PROMPT_LEN,
    Rows,
    empty_state,
    place,
    read_prompts,
    write_chunk,
)
from charlstm.serving.requests import MAX_TOP, ReadRequest, WriteRequest
from charlstm.streaming import with_rows

NUM_PROMPTS = 4  # prompts read at once; on a CPU four rows take about as long as one
FIRST_LEN = 4  # characters of a call while a reader waits for the first one
MAX_PIECES = 32  # that a reader has not taken; its row then pauses


class Piece(NamedTuple):
    """The next characters of a text."""

    ids_T: np.ndarray
    bits_T: np.ndarray
    top_ids_TK: np.ndarray
    top_probs_TK: np.ndarray


class Surprise(NamedTuple):
    """The surprise of a text and the most probable next characters."""

    bits_M: np.ndarray  # NaN for the first character
    top_ids_K: np.ndarray
    top_probs_K: np.ndarray


class End(NamedTuple):
    """The end of a text or of an answer."""

    reason: str  # 'length', 'document', 'stop' of the server, or 'error'


class Task:
    """A request and what has been computed of it. Two threads may use it."""

    def __init__(self, request: WriteRequest | ReadRequest, notify: Callable[[], object]):
        """Store the request; `notify` is called whenever there is something to take."""
        self.request: Any = request
        self.is_left = False  # set when nobody takes the rest
        self.num_read = 0  # characters of the prompt
        self.num_written = 0
        self.steps: Iterator[Predictions] | None = None  # of a ReadRequest
        self.found: list[Predictions] = []
        self._notify = notify
        self._items: deque[Piece | Surprise | End] = deque()

    def put(self, item: Piece | Surprise | End) -> None:
        """Add something to take."""
        self._items.append(item)
        self._notify()

    def take(self) -> list[Piece | Surprise | End]:
        """Return and remove what there is."""
        return [self._items.popleft() for _ in range(len(self._items))]

    @property
    def is_full(self) -> bool:
        """Whether its reader is too slow."""
        return len(self._items) >= MAX_PIECES


class Batcher:
    """The readers of one model. One thread calls `turn`; others may call `add`."""

    def __init__(self, run: Run, model: CharLSTM, params: Any, num_rows: int):
        """Create a batch of `num_rows` rows for texts that are written at the same time."""
        self._run, self._model = run, model
        # Explicit, because a program is compiled again for arrays without a fixed device.
        device = jax.local_devices()[0]
        self._params = jax.device_put(params, device)
        self._num_top = min(MAX_TOP, model.vocab_size)
        self._waiting: deque[Task] = deque()
        self._readings: deque[Task] = deque()
        self._prompts: list[Task | None] = [None] * NUM_PROMPTS
        self._writers: list[Task | None] = [None] * num_rows
        self._prompt_state = jax.device_put(empty_state(model, NUM_PROMPTS), device)
        self._state = jax.device_put(empty_state(model, num_rows), device)
        key_data = np.asarray(jax.random.key_data(run.key(0)))
        settings = Settings(*map(np.array, with_rows(Settings(), num_rows)))  # writable
        keys_BW = np.zeros((num_rows, *key_data.shape), key_data.dtype)
        is_active_B = np.zeros(num_rows, bool)
        self._rows = Rows(keys_BW, np.zeros(num_rows, np.int32), settings, is_active_B)

    @property
    def num_waiting(self) -> int:
        """The number of tasks that have no row yet, or have to be read."""
        return len(self._waiting) + len(self._readings)

    def add(self, task: Task) -> None:
        """Add a task, which a later turn begins."""
        is_reading = isinstance(task.request, ReadRequest)
        (self._readings if is_reading else self._waiting).append(task)

    def tasks(self) -> list[Task]:
        """Return all tasks that have not ended."""
        rows = [*self._prompts, *self._writers]
        return [*self._waiting, *self._readings, *(task for task in rows if task)]

    def turn(self) -> bool:
        """Do a piece of each kind of work; return whether there was any."""
        for rows in (self._prompts, self._writers):
            rows[:] = [None if task is None or task.is_left else task for task in rows]
        self._fill_prompts()
        done = [self._read_prompts(), self._read_surprise(), self._write()]
        return any(done)

    def _fill_prompts(self) -> None:
        free = self._prompts.count(None) + self._writers.count(None) - NUM_PROMPTS
        for row, task in enumerate(self._prompts):
            if task is None and free > 0 and (next_task := self._next_waiting()):
                self._prompts[row] = next_task
                free -= 1

    def _next_waiting(self) -> Task | None:
        while self._waiting:
            task = self._waiting.popleft()
            if not task.is_left:
                return task
        return None

    def _read_prompts(self) -> bool:
        given_BT = np.full((NUM_PROMPTS, PROMPT_LEN), PAD_ID, np.int32)
        is_new_B, count = np.zeros(NUM_PROMPTS, bool), 0
        for row, task in _taken(self._prompts):
            ids_T = task.request.ids_P[task.num_read :][:PROMPT_LEN]
            given_BT[row, : len(ids_T)] = ids_T
            is_new_B[row] = task.num_read == 0
            task.num_read += len(ids_T)
            count = max(count, len(ids_T))
        if not count:
            return False
        self._prompt_state = read_prompts(
            self._model, self._params, self._prompt_state, given_BT, is_new_B, np.int32(count)
        )
        for prompt_row, task in _taken(self._prompts):
            if task.num_read == len(task.request.ids_P):
                self._prompts[prompt_row] = None
                self._begin(task, prompt_row)
        return True

    def _begin(self, task: Task, prompt_row: int) -> None:
        """Give a row to a text whose prompt has been read."""
        row = self._writers.index(None)
        self._writers[row] = task
        places = np.int32(row), self._prompt_state, np.int32(prompt_row)
        self._state = place(self._state, *places)
        key = derive_key(self._run.key(task.request.seed), "sample")
        self._rows.keys_BW[row] = jax.random.key_data(key)
        self._rows.positions_B[row] = 0
        for setting_B, value in zip(self._rows.settings, task.request.settings, strict=True):
            setting_B[row] = value

    def _write(self) -> bool:
        active = [(row, task) for row, task in _taken(self._writers) if not task.is_full]
        if not active:
            return False
        is_first = any(task.num_written == 0 for _, task in active)
        rest = max(task.request.length - task.num_written for _, task in active)
        count = min(FIRST_LEN if is_first else CHUNK_LEN, rest)
        self._rows.is_active_B[:] = False
        self._rows.is_active_B[[row for row, _ in active]] = True
        wants_top = np.bool_(any(task.request.top for _, task in active))
        self._state, written = write_chunk(
            self._model,
            self._run.prng_impl,
            self._num_top,
            self._params,
            self._state,
            self._rows,
            wants_top,
            np.int32(count),
        )
        leaves = [np.array(leaf) for leaf in written]
        self._rows.positions_B[self._rows.is_active_B] += count
        for row, task in active:
            rest = task.request.length - task.num_written
            if self._hand_out(task, Piece(*(leaf[row, : min(count, rest)] for leaf in leaves))):
                self._writers[row] = None
        return True

    def _hand_out(self, task: Task, piece: Piece) -> bool:
        """Put the next characters of a text; return whether it ends with them."""
        ends = np.flatnonzero((piece.ids_T < 0) | (piece.ids_T == self._model.end_id))
        size = int(ends[0]) if len(ends) else len(piece.ids_T)
        task.num_written += size
        if size:
            task.put(Piece(*(leaf[:size] for leaf in piece)))
        reason = "length" if task.num_written == task.request.length else ""
        if len(ends):
            reason = "error" if piece.ids_T[size] < 0 else "document"
        if reason:
            task.put(End(reason))
        return bool(reason)

    def _read_surprise(self) -> bool:
        while self._readings and self._readings[0].is_left:
            self._readings.popleft()
        if not self._readings:
            return False
        task = self._readings.popleft()
        ids_M = task.request.ids_M
        if task.steps is None:
            # One more character, since the prediction of the last one is wanted.
            pieces = _split(np.append(ids_M, 0), SURPRISE_LEN)
            task.steps = predict_pieces(self._model, self._params, pieces, MAX_TOP)
        if (found := next(task.steps, None)) is not None:
            task.found.append(found)
            self._readings.append(task)  # after the others
            return True
        whole = Predictions(*map(np.concatenate, zip(*task.found, strict=True)))
        has_next = len(ids_M) > 0
        top = (
            whole.top_ids_MK[-1][: has_next * MAX_TOP],
            whole.top_probs_MK[-1][: has_next * MAX_TOP],
        )
        task.put(Surprise(whole.bits_M[:-1], *top))
        task.put(End("length"))
        return True


def _taken(rows: Sequence[Task | None]) -> list[tuple[int, Any]]:
    return [(row, task) for row, task in enumerate(rows) if task is not None]


def _split(ids_M: np.ndarray, size: int) -> list[np.ndarray]:
    """Split a text so that each piece completes one chunk of predict_pieces."""
    return np.split(ids_M, range(size + 1, len(ids_M), size))
