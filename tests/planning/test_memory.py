import math

import pytest

from charlstm.planning.memory import find_largest


def search(most, first, needed):
    """Return what find_largest finds for `needed` and the memory of `most` rows, and its tries."""
    tries = []

    def counted(rows):
        tries.append(rows)
        return needed(rows)

    return *find_largest(counted, needed(most), first), tries


@pytest.mark.parametrize(
    ("needed", "most_tries"),
    [
        (lambda rows: 7.0 * rows, 6),
        (lambda rows: 1e6 + 7.0 * rows, 6),
        (lambda rows: 1e3 + rows**1.5, 15),
        (lambda rows: 1e3 + math.sqrt(rows), 15),
        # A compiler needs more for some programs than the line says.
        (lambda rows: 500 + 7.0 * rows + 1000 * (rows > 300), 15),
        (lambda rows: 500 + 7.0 * (-(-rows // 128) * 128), 15),
        # And the memory on the chip may hold small batches.
        (lambda rows: 1e7 + rows + 1e5 * max(rows - 64, 0), 15),
    ],
)
@pytest.mark.parametrize(("most", "first"), [(1, 1), (3, 1000), (1000, 4), (1200, 1200), (99, 100)])
def test_largest_number_of_rows_is_found_with_few_tries(needed, most_tries, most, first):
    fits, refused, tries = search(most, first, needed)
    assert needed(fits) <= needed(most) < needed(refused)
    assert refused - fits <= max(1, fits / 16)
    assert len(tries) <= most_tries


def test_no_rows_are_found_where_one_does_not_fit():
    assert find_largest(lambda rows: 10.0 + rows, 10.5, 64) == (0, 1)
