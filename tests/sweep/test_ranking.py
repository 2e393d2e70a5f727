import pytest

from charlstm.errors import DamagedError
from charlstm.sweep import table
from charlstm.sweep.trials import Trial

KEYS = ["seq_len", "batch_size"]
COLUMNS = table.columns_of(KEYS)


def row(trial, text, seq_len, bits, **others):
    status = 'failed: a "quote", a comma' if bits is None else "finished"
    metrics = {"bits_per_char": "" if bits is None else bits, "status": status, "seconds": 2.0}
    settings = {"seq_len": seq_len, "batch_size": 8}
    return {"trial": trial, "text": text, "seed": 0} | settings | metrics | others


def test_trials_tsv_round_trips_without_an_incomplete_line(tmp_path):
    path = tmp_path / "trials.tsv"
    assert table.read_table(path, COLUMNS) == {}
    for name, bits in (("one", 2.25), ("two", None)):
        table.append(path, COLUMNS, row(name, "a", 32, bits))
    rows = table.read_table(path, COLUMNS)
    assert list(rows) == ["one", "two"]
    assert rows["one"]["bits_per_char"] == "2.25"
    assert rows["two"]["status"] == 'failed: a "quote", a comma'
    whole = path.read_bytes()
    for end in (1, 10, len(whole) - 3):
        path.write_bytes(whole[:end])
        table.read_table(path, COLUMNS)
        assert path.read_bytes() == whole[: whole.rfind(b"\n", 0, end) + 1]
        table.append(path, COLUMNS, row("new", "a", 32, 2.0))
        assert "new" in table.read_table(path, COLUMNS)


@pytest.mark.parametrize(("old", "new"), [("seq_len", "seqlen"), ("2.25", "good"), ("\t8", "")])
def test_damaged_trials_tsv_is_refused(old, new, tmp_path):
    path = tmp_path / "trials.tsv"
    table.append(path, COLUMNS, row("one", "a", 32, 2.25))
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DamagedError, match=r"trials\.tsv: .*--out"):
        table.read_table(path, COLUMNS)


def ranked(*values):
    """Rank trials (text, seq_len, bits, seconds); one with bits '' has no line."""
    trials, rows = [], {}
    for text, seq_len, bits, seconds in values:
        trial = Trial(text, len(trials), {"seq_len": seq_len, "batch_size": 8}, None)
        trials.append(trial)
        if bits != "":
            line = row(trial.name, text, seq_len, bits, seconds=seconds)
            rows[trial.name] = {key: str(value) for key, value in line.items()}
    return table.rank(trials, rows)


def test_best_mean_is_first_and_failed_combinations_last():
    combinations = ranked(
        ("a", 32, 1.0, 2.0),
        ("b", 32, None, 2.0),
        ("a", 16, 2.0, 2.0),
        ("b", 16, 4.0, 2.0),
        ("a", 64, 2.5, 2.0),
        ("a", 64, 1.5, ""),
        ("b", 64, 3.0, 2.0),
    )
    assert [each.settings["seq_len"] for each in combinations] == [64, 16, 32]
    # Texts count the same, whatever their numbers of seeds.
    assert [each.mean_bits for each in combinations[:2]] == [2.5, 3.0]
    assert [each.seconds for each in combinations] == [None, 2.0, 2.0]
    assert table.ranking(combinations).splitlines() == [
        "seq_len  batch_size      bits/char       a       b  seconds",
        "     64           8         2.5000  2.0000  3.0000        -",
        "     16           8         3.0000  2.0000  4.0000      2.0",
        "     32           8  1 of 2 failed  1.0000       -      2.0",
    ]


def test_combination_with_a_missing_trial_is_not_ranked():
    combinations = ranked(("a", 16, 2.0, 1.0), ("b", 16, "", ""), ("a", 32, 3.0, 1.0))
    assert [each.settings["seq_len"] for each in combinations] == [32]


def test_ranking_shows_long_names_uncut():
    names = [f"{letter}{'x' * 200}" for letter in "ab"]
    lines = table.ranking(ranked(*((name, 16, 2.0, 1.0) for name in names))).splitlines()
    assert lines[0].split()[3:5] == names
