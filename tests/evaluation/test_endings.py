from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlstm.evaluation.endings import until_ends

made = st.text("ab", min_size=1, max_size=20)


def as_ids(text):
    return np.array(list(map(ord, text)), np.int32)


def as_text(pieces):
    return "".join(map(chr, np.concatenate(pieces)))


def before_first(text, ends):
    """Return `text` before the end that is complete first."""
    for size in range(len(text) + 1):
        complete = [end for end in ends if text[:size].endswith(end)]
        if complete:
            return text[: size - len(max(complete, key=len))]
    return text


def write(rows, cuts, ends):
    edges = [0, *sorted({cut for cut in cuts if cut < len(rows[0])}), len(rows[0])]
    pieces = [
        np.stack([as_ids(row[start:stop]) for row in rows]) for start, stop in pairwise(edges)
    ]
    return list(zip(*until_ends(pieces, list(map(as_ids, ends))), strict=True))


@given(made, st.lists(st.integers(1, 19)), st.lists(st.text("ab", min_size=1, max_size=4)))
def test_texts_end_before_what_is_complete_first(text, cuts, ends):
    # Of several rows each ends at its own place, wherever the pieces end.
    rows = [text, text[::-1]]
    found = write(rows, cuts, ends)
    assert [as_text(pieces) for pieces in found] == [before_first(row, ends) for row in rows]


@pytest.mark.parametrize(("ends", "count"), [(["x"], 2), (["aa", "x"], 1), (["b"], 4), ([], 4)])
def test_no_piece_is_made_after_all_texts_have_ended(ends, count):
    source = iter(
        [
            np.stack([as_ids(row) for row in rows])
            for rows in (
                ("aa", "aa"),
                ("xa", "xa"),
                ("aa", "aa"),
                ("cc", "cc"),
            )
        ]
    )
    list(until_ends(source, list(map(as_ids, ends))))
    assert len(list(source)) == 4 - count


def test_only_what_may_begin_an_end_is_held_back():
    [pieces] = write(["abcab-"], [1, 2, 3, 4, 5], ["bcd"])
    assert [as_text([piece]) for piece in pieces] == ["a", "", "", "bca", "", "b-", ""]
