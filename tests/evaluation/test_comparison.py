import math

import numpy as np
import pytest
from conftest import ROOT
from helpers import small_config, untrained_run
from scipy import stats

from charlstm.errors import UserError
from charlstm.evaluation import open_held_out
from charlstm.evaluation.comparison import compare_losses, compare_runs, welch_test
from charlstm.evaluation.scoring import LossSums
from charlstm.evaluation.surprise import predict_text
from charlstm.runs.checkpoints import load_model


def sums_of(bits_K, count_K):
    """Return LossSums of blocks with `bits_K` bits per character."""
    count_K = np.asarray(count_K)
    return LossSums(np.asarray(bits_K) * count_K * math.log(2), count_K, correct=0, num_bytes=None)


# --- arrays ---


@pytest.mark.parametrize("sizes", [(2, 2), (3, 5), (8, 2)])
def test_welch_test_is_that_of_scipy(sizes):
    draw = np.random.default_rng(sum(sizes))
    ours, theirs = draw.normal(1.80, 0.01, sizes[0]), draw.normal(1.81, 0.003, sizes[1])
    wanted = stats.ttest_ind(ours, theirs, equal_var=False)
    found = welch_test(ours, theirs)
    assert found.t == pytest.approx(wanted.statistic)
    assert found.degrees_of_freedom == pytest.approx(wanted.df)
    assert found.p_value == pytest.approx(wanted.pvalue, rel=1e-4)  # float32
    assert found.t * found.standard_error == pytest.approx(ours.mean() - theirs.mean())


def test_welch_test_needs_two_differing_values_of_each():
    assert welch_test(np.array([1.0]), np.array([1.0, 2.0])) is None
    assert welch_test(np.array([1.0, 1.0]), np.array([2.0, 2.0])) is None


def test_difference_and_errors_worked_out_by_hand():
    ours = [sums_of([1.0, 3.0], [10, 30]), sums_of([1.2, 3.2], [10, 30])]
    theirs = [sums_of([1.5, 3.1], [10, 30])]
    found = compare_losses(ours, theirs)
    # Means over characters: 2.5, 2.7 and 2.7.
    assert found["difference"] == pytest.approx(2.6 - 2.7)
    # The blocks differ by 1.1 - 1.5 and 3.1 - 3.1: the deviation is 0.4 / sqrt(2), of 2 blocks.
    assert found["standard_error"] == pytest.approx(0.2)
    assert found["between_seeds"] is None  # one run on a side
    both = compare_losses(ours, [*theirs, sums_of([1.5, 3.5], [10, 30])])["between_seeds"]
    # Variances of 2.5, 2.7 and of 2.7, 3.0 over 2 runs each.
    assert both["standard_error"] == pytest.approx(math.sqrt(0.02 / 2 + 0.045 / 2))


def test_error_between_blocks_is_that_of_other_texts():
    # Passages are hard for both runs; the error of the difference has no part of that.
    draw = np.random.default_rng(0)
    hard_NK = draw.normal(0, 1, (300, 30))
    ours_NK, theirs_NK = (2 + hard_NK + draw.normal(0, 0.1, (300, 30)) for _ in range(2))
    count_K = np.full(30, 100)
    found = [
        compare_losses([sums_of(ours_K, count_K)], [sums_of(theirs_K, count_K)])
        for ours_K, theirs_K in zip(ours_NK, theirs_NK, strict=True)
    ]
    spread = np.std([one["difference"] for one in found])
    assert np.mean([one["standard_error"] for one in found]) == pytest.approx(spread, rel=0.1)


# --- runs ---


@pytest.fixture(scope="module")
def make_run(tmp_path_factory, book):
    """Return make_run(name, **changes), which returns the folder of a run with made-up weights."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "book.txt").write_text(book, encoding="utf-8")
    (folder / "more.txt").write_text("0123" + book, encoding="utf-8")

    def make(name, path="book.txt", **changes):
        # 1,200 held-out characters.
        changes = {"data.val_fraction": 0.2} | changes
        return untrained_run(small_config(folder / path, **changes), folder / name).workdir

    return make


@pytest.fixture(scope="module")
def first(make_run):
    return make_run("first")


def test_runs_are_compared_on_the_same_characters(make_run, book, tmp_path):
    # A trained run, and one on windows with another vocabulary.
    trained = ROOT / "tests" / "fixtures" / "run_schema_1"
    changes = {"data.order": "windows", "data.loss_on": "last"}
    windows = make_run("windows", "more.txt", **changes)
    path = str(tmp_path / "text.txt")
    (tmp_path / "text.txt").write_text(book[:1000], encoding="utf-8")
    found = compare_runs([trained], [windows], path=path)
    # The first window has 16 characters; its last one is followed by the first prediction.
    assert (found["characters"], found["blocks"]) == (1000 - 16, 9)
    run, model, params = load_model(trained)
    ids_M = open_held_out(run, path, with_training_part=False).ids_M
    bits_M = predict_text(model, params, ids_M).bits_M
    ours, theirs = found["runs"][0]["bits_per_char"], found["compared"][0]["bits_per_char"]
    assert ours == pytest.approx(bits_M[16:].mean(), rel=1e-6)
    assert ours != pytest.approx(bits_M[1:].mean(), rel=1e-5)
    assert found["difference"] == pytest.approx(ours - theirs)
    assert 0 < found["standard_error"] < theirs - ours


def test_runs_of_one_side_differ_in_the_seed_only(first, make_run):
    wide = make_run("wide", **{"model.hidden_size": 8, "seed": 1})
    with pytest.raises(UserError, match=r"first and .*wide: .*model.hidden_size is 16 and 8"):
        compare_runs([first, wide], [first])
    with pytest.raises(UserError, match="have the seeds 0, 0"):
        compare_runs([wide], [first, first])


def test_runs_that_predict_different_characters_are_refused(first, make_run):
    lower = make_run("lower", **{"data.lowercase": True})
    with pytest.raises(UserError, match=r"first and .*lower: .*'[A-Z]' and '[a-z]' at character"):
        compare_runs([first], [lower])
    longer = make_run("longer", **{"data.val_fraction": 0.3})
    with pytest.raises(UserError, match=r"1,200 and 1,800 characters.*--text"):
        compare_runs([first], [longer])
