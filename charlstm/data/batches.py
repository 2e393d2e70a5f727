"""Batches as a pure function of the step, so that a resume needs no saved position."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from charlstm.checks import check_count, check_rate
from charlstm.errors import UserError

ALL_ROWS = slice(None)
# The shuffled order of an epoch takes 8 bytes for each window.
MAX_SHUFFLED = 2**24


class Batch(NamedTuple):
    """Input of a training or evaluation step, as NumPy or JAX arrays.

    Batches of S steps are one Batch with the axis S in front.
    """

    inputs_BT: Any  # int32 ids, 0 to V - 1, also at positions of weight 0
    targets_BT: Any  # int32 ids of the characters that follow
    weights_BT: Any  # float32, 0 where a position does not count
    reset_B: Any  # bool, where the carry is reset


@dataclass(frozen=True, eq=False)
class Streams:
    """A text cut into B streams of equal length, which are read in parallel in windows of T.

    Every character except the first is a target exactly once per epoch. Each epoch starts with a
    zero carry. Within an epoch the carry passes from one window to the next, unless it is reset at
    random.

    Attributes:
      ids_M: the text.
      batch_size: B, at most M - 1.
      seq_len: T.
      context: characters, a multiple of T, that each stream except the first reads with weight 0
        before its own, to warm up its carry; at most the length of a stream.
      state_reset_prob: the probability of resetting the carry of a row before a window, below 1.
      seed: the seed of these resets.

    Raises:
      ValueError: for an invalid attribute, or a text too short for B.
    """

    ids_M: np.ndarray
    batch_size: int
    seq_len: int
    context: int = 0
    state_reset_prob: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_text(self.ids_M)
        check_count("batch_size", self.batch_size)
        check_count("seq_len", self.seq_len)
        check_count("context", self.context, least=0)
        check_rate("state_reset_prob", self.state_reset_prob)
        check_count("seed", self.seed, least=0)
        if self.batch_size >= len(self.ids_M):
            raise ValueError(
                f"batch_size={self.batch_size}: a text of {len(self.ids_M)} characters has at most "
                f"{len(self.ids_M) - 1} streams"
            )
        if self.context % self.seq_len:
            raise ValueError(
                f"context={self.context}: must be a multiple of seq_len={self.seq_len}"
            )

    @property
    def bounds(self) -> np.ndarray:
        """The B + 1 positions between the streams, as indices of inputs."""
        return np.arange(self.batch_size + 1) * (len(self.ids_M) - 1) // self.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Windows of the longest stream."""
        return -(-(int(np.diff(self.bounds).max()) + self.context) // self.seq_len)

    def __call__(self, step: int | np.ndarray, rows: slice = ALL_ROWS) -> Batch:
        """Return the batch of `step`, or the batches of steps_S with the axis S in front.

        Args:
          step: from 0, counted over all epochs.
          rows: the rows of B to read.
        """
        window_S = np.asarray(step) % self.steps_per_epoch
        begin_B, end_B = self.bounds[:-1][rows], self.bounds[1:][rows]
        first_SB = begin_B - self.context + window_S[..., None] * self.seq_len
        position_SBT = first_SB[..., None] + np.arange(self.seq_len)
        counts_SBT = (position_SBT >= begin_B[:, None]) & (position_SBT < end_B[:, None])
        safe_SBT = np.clip(position_SBT, 0, len(self.ids_M) - 2)
        # The first stream has no context: it resets where the text begins.
        reset_SB = (window_S == 0)[..., None] | (first_SB == 0) | self._resets(step)[..., rows]
        return _gather(self.ids_M, safe_SBT, counts_SBT, reset_SB)

    def epoch(self) -> Iterator[Batch]:
        """Yield the batches of the first epoch."""
        return map(self, range(self.steps_per_epoch))

    def _resets(self, step: int | np.ndarray) -> np.ndarray:
        """Return which rows are reset at random, as a function of seed, step and row only."""
        place_SB = np.asarray(step)[..., None] * self.batch_size + np.arange(self.batch_size)
        # An array, because NumPy warns about overflowing scalars.
        key_1 = _mix(np.array([self.seed], np.uint64))
        return _mix(_mix(place_SB.astype(np.uint64)) ^ key_1) < np.uint64(
            self.state_reset_prob * 2.0**64
        )


@dataclass(frozen=True, eq=False)
class Windows:
    """All windows of T characters with their targets, shuffled per epoch, without a carry.

    The last batch of an epoch is padded with windows of weight 0, so that all have one shape.

    Attributes:
      ids_M: the text, which has M - T windows.
      batch_size: B.
      seq_len: T.
      last_only: count only the target of the last time step of each window.
      seed: the seed of the order; None keeps the order of the text.

    Raises:
      ValueError: for an invalid attribute, or a text too short for T.
    """

    ids_M: np.ndarray
    batch_size: int
    seq_len: int
    last_only: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        check_text(self.ids_M)
        check_count("batch_size", self.batch_size)
        check_count("seq_len", self.seq_len)
        if self.seed is not None:
            check_count("seed", self.seed, least=0)
        if self.seq_len >= len(self.ids_M):
            raise ValueError(
                f"seq_len={self.seq_len}: a text of {len(self.ids_M)} characters has windows of at "
                f"most {len(self.ids_M) - 1}"
            )
        if self.seed is not None and self.num_windows > MAX_SHUFFLED:
            raise ValueError(
                f"ids_M: has {self.num_windows:,} windows; at most {MAX_SHUFFLED:,} can be shuffled"
            )

    @property
    def num_windows(self) -> int:
        """Windows of the text."""
        return len(self.ids_M) - self.seq_len

    @property
    def steps_per_epoch(self) -> int:
        """Batches that contain each window once."""
        return -(-self.num_windows // self.batch_size)

    def __call__(self, step: int | np.ndarray, rows: slice = ALL_ROWS) -> Batch:
        """Return the batch of `step`, or the batches of steps_S with the axis S in front.

        Args:
          step: from 0, counted over all epochs.
          rows: the rows of B to read.
        """
        epoch_S, index_S = np.divmod(step, self.steps_per_epoch)
        place_SB = index_S[..., None] * self.batch_size + np.arange(self.batch_size)[rows]
        is_real_SB = place_SB < self.num_windows
        start_SB = np.where(is_real_SB, place_SB, 0)
        if self.seed is not None:
            for epoch in np.unique(epoch_S):
                shuffled_SB = _permutation(self.seed, int(epoch), self.num_windows)[start_SB]
                chosen_SB = is_real_SB & (epoch_S == epoch)[..., None]
                start_SB = np.where(chosen_SB, shuffled_SB, start_SB)
        position_SBT = start_SB[..., None] + np.arange(self.seq_len)
        is_counted_T = np.arange(self.seq_len) >= (self.seq_len - 1 if self.last_only else 0)
        counts_SBT = is_real_SB[..., None] & is_counted_T
        return _gather(self.ids_M, position_SBT, counts_SBT, np.ones(start_SB.shape, bool))

    def epoch(self) -> Iterator[Batch]:
        """Yield the batches of the first epoch."""
        return map(self, range(self.steps_per_epoch))


def check_text(ids_M: Any) -> None:
    """Raise ValueError unless `ids_M` has one axis of at least two integers."""
    dtype = getattr(ids_M, "dtype", None)
    if dtype is None or not np.issubdtype(dtype, np.integer) or np.ndim(ids_M) != 1:
        raise ValueError(
            "ids_M: must be an array of integers with one axis, the ids of a text, such as "
            f"Vocab.encode gives; got {dtype or type(ids_M).__name__} of the shape "
            f"{np.shape(ids_M)}"
        )
    if len(ids_M) < 2:
        raise ValueError(f"ids_M: has {len(ids_M)} character(s), too few to predict one")


def read_steps(
    batches: Streams | Windows, first: int, count: int, capacity: int, rows: slice = ALL_ROWS
) -> Batch:
    """Return the batches of `count` steps from `first` on, padded with zeros to `capacity`."""
    steps_S = batches(np.arange(first, first + count), rows)

    def pad(leaf_S: np.ndarray) -> np.ndarray:
        full_S = np.zeros((capacity, *leaf_S.shape[1:]), leaf_S.dtype)
        full_S[:count] = leaf_S
        return full_S

    return Batch(*map(pad, steps_S))


def _gather(
    ids_M: np.ndarray, position_BT: np.ndarray, is_counted_BT: np.ndarray, reset_B: np.ndarray
) -> Batch:
    return Batch(
        inputs_BT=ids_M[position_BT].astype(np.int32),
        targets_BT=ids_M[position_BT + 1].astype(np.int32),
        weights_BT=is_counted_BT.astype(np.float32),
        reset_B=reset_B,
    )


def _mix(number: np.ndarray) -> np.ndarray:
    # The finalizer of splitmix64 (Steele, Lea and Flood 2014): each bit affects half of the bits.
    number = (number ^ number >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ number >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return number ^ number >> np.uint64(31)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    # Cached for this epoch and the next, because drawing it takes 20 ms.
    return np.random.default_rng((seed, epoch)).permutation(size)


def split(ids_M: np.ndarray, data: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Return the training part and the validation part of a text, as `config.data` asks for.

    The validation part is the last `val_fraction` of the text, but at most `max_val_chars`
    characters; 0 means no limit.
    """
    count = round(len(ids_M) * data.val_fraction)
    cut = len(ids_M) - min(count, data.max_val_chars or count)
    return ids_M[:cut], ids_M[cut:]


def training_batches(ids_M: np.ndarray, config: ConfigDict) -> Streams | Windows:
    """Return the batches that `config` trains on.

    Raises:
      UserError: if the text is too short for batch_size and seq_len.
    """
    batch_size, seq_len = config.batch_size, config.seq_len
    if len(ids_M) <= seq_len:
        raise UserError(
            f"config.seq_len={seq_len}: the training text has {len(ids_M)} characters, too few "
            "for one window and the character after it; give a longer text or a smaller seq_len"
        )
    is_windows = config.data.order == "windows"
    if is_windows and len(ids_M) - seq_len > MAX_SHUFFLED:
        raise UserError(
            f"config.data.order=windows: the text has {len(ids_M) - seq_len:,} windows, "
            f"and at most {MAX_SHUFFLED:,} can be shuffled; use config.data.order=streams"
        )
    needed = batch_size + seq_len if is_windows else batch_size * seq_len + 1
    if len(ids_M) < needed:
        raise UserError(
            f"config.batch_size={batch_size}: with config.seq_len={seq_len} it takes at least "
            f"{needed:,} characters of training text, and there are {len(ids_M):,}; "
            "lower batch_size or seq_len"
        )
    if is_windows:
        last_only = config.data.loss_on == "last"
        return Windows(ids_M, batch_size, seq_len, last_only, seed=config.seed)
    return Streams(
        ids_M, batch_size, seq_len, state_reset_prob=config.data.state_reset_prob, seed=config.seed
    )


def evaluation_batches(
    ids_M: np.ndarray, config: ConfigDict, batch_size: int | None = None
) -> Streams | Windows:
    """Return batches that count each character of a held-out text once.

    Args:
      ids_M: the held-out text.
      config: the settings of the run: stateful for order=streams, stateless for order=windows.
      batch_size: the number of streams, by default that of training; 1 reads the text in order. A
        text too short for it is read in fewer streams.

    Raises:
      UserError: if the text is too short to predict anything in it.
    """
    shortest = config.seq_len + 1 if config.data.order == "windows" else 2
    if len(ids_M) < shortest:
        raise UserError(
            f"a text of {len(ids_M)} character(s) is too short to evaluate: at least {shortest} "
            "are needed; give a longer text, or set config.data.val_fraction higher, or to 0"
        )
    if config.data.order == "windows":
        # Counting all positions would count a character once for each window it is in.
        return Windows(ids_M, config.batch_size, config.seq_len, last_only=True)
    # Streams shorter than their context would read more context than text.
    most = max(1, len(ids_M) // (2 * config.seq_len))
    wanted = batch_size or config.batch_size
    # A power of two, because devices share rows only if their number divides them.
    num_streams = wanted if wanted <= most else 2 ** (most.bit_length() - 1)
    return Streams(ids_M, num_streams, config.seq_len, context=config.seq_len)


def cold_batches(ids_M: np.ndarray, seq_len: int, batch_size: int) -> Iterator[Batch]:
    """Yield a text as adjacent windows of T characters, each read from a zero carry.

    Every character except the first is a target exactly once. Positions after the end of the text
    have weight 0, so that all batches have one shape.
    """
    last = len(ids_M) - 1
    for begin in range(0, last, batch_size * seq_len):
        position_BT = np.arange(begin, begin + batch_size * seq_len).reshape(batch_size, seq_len)
        safe_BT = np.minimum(position_BT, last - 1)
        yield _gather(ids_M, safe_BT, position_BT < last, np.ones(batch_size, bool))
