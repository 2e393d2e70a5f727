import numpy as np
import pytest

from charlstm.evaluation.probes import linear_probe, probe_units

M = 2000


def slow_noise(draw, num_units, keep=0.97):
    """Return an autoregressive process of the first order for each unit."""
    noise_MH = draw.normal(size=(M, num_units))
    for place in range(1, M):
        noise_MH[place] += keep * noise_MH[place - 1]
    return noise_MH


def slow_flag(draw):
    """Return a boolean feature that stays for about 40 characters."""
    return slow_noise(draw, 1)[:, 0] > 0


def auc_by_pairs(values_N, is_true_N):
    """Return the share of pairs in which the character with the feature has the higher value."""
    differences = values_N[is_true_N][:, None] - values_N[~is_true_N][None, :]
    return float(np.mean((differences > 0) + 0.5 * (differences == 0)))


def spearman_by_counting(values_N, feature_N):
    """Return the correlation of ranks, each rank counted by comparing all pairs."""
    count = lambda x_N: np.sum(np.sign(x_N[:, None] - x_N[None, :]), axis=1)  # noqa: E731
    return float(np.corrcoef(count(values_N), count(feature_N))[0, 1])


def test_scores_are_those_of_all_pairs_of_characters():
    draw = np.random.default_rng(0)
    flag_M, number_M = draw.random(400) < 0.3, draw.integers(0, 5, 400).astype(float)
    states_MH = draw.normal(size=(400, 3)).round(1)  # rounded: with ties
    states_MH[:, 1] -= 2 * flag_M
    states_MH[:, 2] += number_M
    found = probe_units(states_MH, {"flag": flag_M, "number": number_M}, num_shifts=5)
    flag, number = found["flag"], found["number"]
    assert (flag.measure, number.measure) == ("AUC", "Spearman")
    assert (flag.units_H[0], flag.signs_H[0]) == (1, -1)
    assert (number.units_H[0], number.signs_H[0]) == (2, 1)
    half = slice(200, None)
    for place, unit in enumerate(flag.units_H):
        wanted = auc_by_pairs(flag.signs_H[place] * states_MH[half, unit], flag_M[half])
        assert flag.scores_H[place] == pytest.approx(wanted, abs=1e-6)
    for place, unit in enumerate(number.units_H):
        wanted = spearman_by_counting(states_MH[half, unit], number_M[half])
        assert number.signs_H[place] * number.scores_H[place] == pytest.approx(wanted, abs=1e-6)
    assert list(flag.scores_H) == sorted(flag.scores_H, reverse=True)


def test_a_unit_that_is_the_feature_plus_noise_is_found():
    draw = np.random.default_rng(1)
    flag_M = slow_flag(draw)
    states_MH = slow_noise(draw, 30)
    states_MH[:, 17] = flag_M + draw.normal(0, 0.5, M)
    found = probe_units(states_MH, {"flag": flag_M})["flag"]
    assert found.units_H[0] == 17
    # P(N(1, s) > N(0, s)) with s = 1/2 is the normal distribution at sqrt(2): 0.921.
    assert found.scores_H[0] == pytest.approx(0.921, abs=0.03)
    assert found.scores_H[0] > found.control > found.scores_H[1]


def test_unrelated_slow_units_exceed_the_control_in_5_percent():
    num_units, num_probes, num_shuffled = 0, 0, 0
    for seed in range(40):
        draw = np.random.default_rng(seed)
        states_MH, feature_M = slow_noise(draw, 10), slow_noise(draw, 1)[:, 0]
        features = {"flag": feature_M > 0}
        [units] = probe_units(states_MH, features, num_shifts=60, seed=seed).values()
        [probe] = linear_probe(states_MH, features, num_shifts=60, seed=seed).values()
        num_units += units.scores_H[0] > units.control
        num_probes += probe.score > probe.control
        # White noise has the same values in another order: its control is too low.
        white_MH = draw.permuted(states_MH, axis=0)
        [white] = probe_units(white_MH, features, num_shifts=60, seed=seed).values()
        num_shuffled += units.scores_H[0] > white.control
    # 40 draws with a probability of 0.05 exceed 7 with a probability of 0.0007.
    assert num_units <= 7
    assert num_probes <= 7
    assert num_shuffled > 20


def test_the_linear_probe_reads_what_no_unit_has_alone():
    draw = np.random.default_rng(2)
    states_MH = slow_noise(draw, 16)
    number_M = states_MH @ draw.normal(size=16)
    features = {"sum": number_M, "sign": number_M > np.median(number_M)}
    probes, units = linear_probe(states_MH, features), probe_units(states_MH, features)
    assert probes["sum"].measure == "Spearman"
    assert probes["sum"].score > 0.99
    assert probes["sign"].score > 0.95
    for name, probe in probes.items():
        assert probe.score > max(probe.control, units[name].scores_H[0])


def test_features_with_one_value_in_a_half_are_left_out():
    draw = np.random.default_rng(3)
    states_MH, features = draw.normal(size=(100, 2)), {"once": np.arange(100) == 3}
    features |= {"always": np.ones(100, bool), "place": np.arange(100.0)}
    for probe in (probe_units, linear_probe):
        assert list(probe(states_MH, features)) == ["place"]


def test_a_unit_that_never_changes_scores_as_by_chance():
    flag_M = np.arange(100) % 3 == 0
    found = probe_units(np.ones((100, 1)), {"flag": flag_M, "place": np.arange(100.0)})
    assert (found["flag"].scores_H[0], found["place"].scores_H[0]) == (0.5, 0.0)
    assert linear_probe(np.ones((100, 1)), {"flag": flag_M})["flag"].score == 0.5


@pytest.mark.parametrize(
    ("states_MH", "feature_M"),
    [
        (np.zeros((9, 2)), np.zeros(8)),
        (np.zeros((9, 2)), np.full(9, np.nan)),
        (np.full((9, 2), np.inf), np.zeros(9)),
        (np.zeros(9), np.zeros(9)),
        (np.zeros((3, 2)), np.zeros(3)),
    ],
)
def test_invalid_arrays_are_refused(states_MH, feature_M):
    with pytest.raises(ValueError, match=r"states_MH|features\['x'\]"):
        probe_units(states_MH, {"x": feature_M})
