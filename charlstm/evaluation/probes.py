"""How well units explain features of a text, beside a control with shifted features.

Scores. The score of a unit or probe is the area under the ROC curve (AUC) for a boolean feature:
the probability that its value is higher at a random character with the feature than at one without
(Hanley and McNeil 1982). For a feature of numbers it is Spearman's rank correlation. Both depend on
ranks only, thus on no threshold and no scale. An unrelated unit has an AUC of 0.5 and a correlation
of 0. Signs and weights are fitted on the first half of a text, scores are those of the second half.

Control. A score shows that the states hold a feature if it exceeds the score of the same probe on a
control task (Hewitt and Liang 2019, arXiv 1909.03368). The control task here is the feature itself,
shifted in a circle by a random number of characters within each half. Neighbouring characters have
similar states and similar features, and two slow series correlate by chance even if they are
unrelated (Yule 1926, 'Why do we sometimes get nonsense-correlations between time-series?').
Shuffled characters would lack this dependence, and their score would be too low. A shifted feature
keeps its values, its autocorrelation and its periods; only its alignment with the states is lost.
The control assumes a stationary text. Harris 2020 (arXiv 2012.06862) proves such a test for shifts
without a seam.

Many units. The best of H unrelated units scores better than one of them. Therefore the control of
units is a quantile, over all shifts, of the score of the best unit: the maximum statistic of a
permutation test (Nichols and Holmes 2002, 'Nonparametric permutation tests for functional
neuroimaging').
"""

from typing import NamedTuple

import numpy as np

CONTROL_QUANTILE = 0.95  # of the scores of shifted features
MIN_SHIFT = 0.05  # of half of the text, so that no control is almost the feature itself
RIDGE = 0.01  # relative to the variance of a unit


class UnitScores(NamedTuple):
    """The scores of H units for one feature, from the best unit to the worst."""

    measure: str  # 'AUC' or 'Spearman'
    units_H: np.ndarray  # columns of states_MH
    scores_H: np.ndarray
    signs_H: np.ndarray  # -1 for a unit that is low where the feature is high, otherwise 1
    control: float  # the best of H units exceeds it in 5 % of the shifts


class ProbeScore(NamedTuple):
    """The score of a linear probe of H units for one feature."""

    measure: str  # 'AUC' or 'Spearman'
    score: float
    control: float  # the probe exceeds it in 5 % of the shifts


def probe_units(
    states_MH: np.ndarray,
    features: dict[str, np.ndarray],
    *,
    num_shifts: int = 200,
    seed: int = 0,
) -> dict[str, UnitScores]:
    """Return how well each unit alone explains each feature, by the name of the feature.

    Args:
      states_MH: the values of H units at M characters, such as c_BTH of a layer of record_states,
        or several layers and gates side by side.
      features: arrays of M booleans or numbers, as text_features returns them. A feature that has
        one value only in either half of the text cannot be scored and is left out.
      num_shifts: the number of shifted features.
      seed: selects the shifts.

    Raises:
      ValueError: if the lengths differ, a half has fewer than two characters, or a value is not
        finite.
    """
    features = _scorable(states_MH, features)
    halves = [_ranks(half_NH) for half_NH in _halves(np.asarray(states_MH))]
    shifts_S = _draw_shifts(num_shifts, seed)
    found = {}
    for name, feature_M in features.items():
        first, second = (
            _scores(ranks_NH, half_N, shifts_S)
            for ranks_NH, half_N in zip(halves, _halves(feature_M), strict=True)
        )
        signs_HS = np.where(first < 0, -1, 1)
        scores_HS = signs_HS * second + _score_by_chance(feature_M)
        order_H = np.argsort(-scores_HS[:, 0], kind="stable")
        found[name] = UnitScores(
            _measure(feature_M),
            order_H,
            scores_HS[order_H, 0],
            signs_HS[order_H, 0],
            float(np.quantile(scores_HS[:, 1:].max(axis=0), CONTROL_QUANTILE)),
        )
    return found


def linear_probe(
    states_MH: np.ndarray,
    features: dict[str, np.ndarray],
    *,
    num_shifts: int = 50,
    seed: int = 0,
) -> dict[str, ProbeScore]:
    """Return how well all units together explain each feature, by the name of the feature.

    The probe is a linear function of H units (Alain and Bengio 2016, arXiv 1610.01644). Its weights
    are those of ridge regression on the first half; for a boolean feature that is, up to scale and
    the ridge, Fisher's linear discriminant (Bishop 2006, section 4.1.5). The control is fitted and
    scored in the same way, on shifted features.

    Arguments and errors are those of probe_units.
    """
    features = _scorable(states_MH, features)
    shifts_S = _draw_shifts(num_shifts, seed)
    states_MH = np.asarray(states_MH, np.float64)
    mean_H, scale_H = (statistic(_halves(states_MH)[0], axis=0) for statistic in (np.mean, np.std))
    first, second = _halves((states_MH - mean_H) / np.where(scale_H > 0, scale_H, 1))
    gram_HH = first.T @ first + RIDGE * len(first) * np.eye(first.shape[1])
    found = {}
    for name, feature_M in features.items():
        half_N = _halves(feature_M)[0].astype(np.float64)
        moments_HS = first.T @ _shifted(half_N - half_N.mean(), shifts_S)
        ranks_NS = _ranks(second @ np.linalg.solve(gram_HH, moments_HS))
        scores_S = np.array(
            [
                _scores(rank_N[:, None], _halves(feature_M)[1], shifts_S[[place]])[0, 0]
                for place, rank_N in enumerate(ranks_NS.T)
            ]
        ) + _score_by_chance(feature_M)
        control = float(np.quantile(scores_S[1:], CONTROL_QUANTILE))
        found[name] = ProbeScore(_measure(feature_M), float(scores_S[0]), control)
    return found


def _halves(array_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    middle = len(array_M) // 2
    return array_M[:middle], array_M[middle:]


def _scorable(states_MH: np.ndarray, features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the features that vary in both halves; raise ValueError for invalid arguments."""
    if np.ndim(states_MH) != 2 or len(states_MH) < 4 or not np.all(np.isfinite(states_MH)):
        raise ValueError(
            "states_MH: must be finite numbers with two axes, at least 4 characters and the units; "
            f"got the shape {np.shape(states_MH)}"
        )
    for name, feature_M in features.items():
        if np.shape(feature_M) != np.shape(states_MH)[:1] or not np.all(np.isfinite(feature_M)):
            raise ValueError(
                f"features[{name!r}]: must be {len(states_MH)} finite numbers, as states_MH has; "
                f"got the shape {np.shape(feature_M)}"
            )
    return {
        name: np.asarray(feature_M)
        for name, feature_M in features.items()
        if all(np.ptp(half_N) > 0 for half_N in _halves(np.asarray(feature_M, np.float64)))
    }


def _draw_shifts(num_shifts: int, seed: int) -> np.ndarray:
    """Return random shifts as shares of a half, after the shift 0."""
    drawn = np.random.default_rng(seed).uniform(MIN_SHIFT, 1 - MIN_SHIFT, num_shifts)
    return np.append(0.0, drawn)


def _shifted(values_N: np.ndarray, shifts_S: np.ndarray) -> np.ndarray:
    """Return values_NS, the values after each circular shift."""
    places_S = np.rint(shifts_S * len(values_N)).astype(int)
    return np.stack([np.roll(values_N, place) for place in places_S], axis=1)


def _ranks(values_NH: np.ndarray) -> np.ndarray:
    """Return the ranks within each column minus their mean; equal values have their mean rank."""
    ranks_HN = np.empty(values_NH.shape[::-1], np.float32)
    for ranks_N, values_N in zip(ranks_HN, values_NH.T, strict=True):
        _, place_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
        highest = np.cumsum(counts)
        ranks_N[:] = (highest - (counts - 1) / 2 - (len(values_N) + 1) / 2)[place_N]
    return ranks_HN.T


def _scores(ranks_NH: np.ndarray, feature_N: np.ndarray, shifts_S: np.ndarray) -> np.ndarray:
    """Return scores_HS of each unit and each shift, minus the score of an unrelated unit.

    For a boolean feature that is AUC - 1/2, the mean of the centred ranks where it is true, divided
    by the number of characters where it is false (the Mann-Whitney statistic).
    """
    if feature_N.dtype == bool:
        num_true = int(feature_N.sum())
        weights_N = feature_N / (num_true * (len(feature_N) - num_true))
        return ranks_NH.T @ _shifted(weights_N.astype(np.float32), shifts_S)
    feature_ranks_N = _ranks(feature_N[:, None])[:, 0]
    weights_N = feature_ranks_N / np.linalg.norm(feature_ranks_N)
    lengths_H = np.linalg.norm(ranks_NH, axis=0)
    scores_HS = ranks_NH.T @ _shifted(weights_N, shifts_S)
    return scores_HS / np.where(lengths_H > 0, lengths_H, 1)[:, None]


def _measure(feature_M: np.ndarray) -> str:
    return "AUC" if feature_M.dtype == bool else "Spearman"


def _score_by_chance(feature_M: np.ndarray) -> float:
    return 0.5 if feature_M.dtype == bool else 0.0
