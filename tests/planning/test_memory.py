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
    "needed",
    [
        lambda rows: 7.0 * rows,
        lambda rows: 1e6 + 7.0 * rows,
        lambda rows: 1e3 + rows**1.5,
        lambda rows: 1e3 + math.sqrt(rows),
        # A compiler needs more for some programs than the line says.
        lambda rows: 500 + 7.0 * rows + 1000 * (rows > 300),
        lambda rows: 500 + 7.0 * (-(-rows // 128) * 128),
    ],
)
@pytest.mark.parametrize(("most", "first"), [(1, 1), (3, 1000), (1000, 4), (1200, 1200), (99, 100)])
def test_largest_number_of_rows_is_found_with_few_tries(needed, most, first):
    fits, refused, tries = search(most, first, needed)
    assert needed(fits) <= needed(most) < needed(refused)
    assert refused - fits <= max(1, fits / 16)
    assert len(tries) <= 15


def test_no_rows_are_found_where_one_does_not_fit():
    assert find_largest(lambda rows: 10.0 + rows, 10.5, 64) == (0, 1)
