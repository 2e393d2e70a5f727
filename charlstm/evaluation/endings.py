"""Ends of generated texts: sequences of characters before which a text stops."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np


def until_ends(
    pieces: Iterable[np.ndarray], ends: Sequence[np.ndarray]
) -> Iterator[list[np.ndarray]]:
    """Yield the pieces of B texts, each up to the end that is complete first, until all have ended.

    Characters with which an end may begin are held back until it is known. Rows that have ended
    yield empty pieces.

    Args:
      pieces: ids_BT.
      ends: ids of each sequence, at least one; without sequences no text ends early.
    """
    held: list[np.ndarray] = []
    is_ended: list[bool] = []
    for ids_BT in pieces:
        held = held or [ids_BT[0, :0]] * len(ids_BT)
        is_ended = is_ended or [False] * len(ids_BT)
        shown = []
        for row, ids_T in enumerate(ids_BT):
            text_T = np.concatenate([held[row], ids_T[: 0 if is_ended[row] else None]])
            size, found = before_end(text_T, ends)
            is_ended[row] |= found
            shown.append(text_T[:size])
            held[row] = text_T[len(text_T) if found else size :]
        yield shown
        if all(is_ended):
            return
    if held:
        yield held


def before_end(ids_T: np.ndarray, ends: Sequence[np.ndarray]) -> tuple[int, bool]:
    """Return how many characters come before the end that is complete first, and if there is one.

    Without one, the last characters do not count if an end may begin with them.
    """
    found = [(place + len(end), place) for end in ends if (place := find(ids_T, end)) is not None]
    if found:
        return min(found)[1], True
    begun = [
        size
        for end in ends
        for size in range(1, min(len(end), len(ids_T) + 1))
        if np.array_equal(ids_T[len(ids_T) - size :], end[:size])
    ]
    return len(ids_T) - max(begun, default=0), False


def find(ids_T: np.ndarray, end: np.ndarray) -> int | None:
    """Return where `end` first occurs, or None."""
    if len(ids_T) < len(end):
        return None
    windows_TS = np.lib.stride_tricks.sliding_window_view(ids_T, len(end))
    [places] = np.nonzero(np.all(windows_TS == end, axis=1))
    return int(places[0]) if len(places) else None
