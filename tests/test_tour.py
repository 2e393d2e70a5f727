"""The tour for programmers runs, and shows what it says."""

import runpy

import numpy as np
import pytest
from conftest import ROOT

from charlstm.exchange.folder import as_trained


@pytest.fixture(scope="module")
def tour():
    """Return the names that tests/tour.py leaves."""
    return runpy.run_path(str(ROOT / "tests" / "tour.py"))


def test_losses_of_the_tour_fall_and_its_seeds_differ(tour):
    losses_RS = np.asarray(tour["losses_RS"])
    assert losses_RS.shape == (3, 60)
    assert np.all(losses_RS[:, -10:].mean(axis=1) < losses_RS[:, 0] - 1)
    assert len(np.unique(losses_RS[:, -1])) == 3
    assert tour["head_losses_S"][-1] < tour["head_losses_S"][0] / 2


def test_probes_of_the_tour_exceed_their_control(tour):
    assert len(tour["probes"]) == 2
    for probe in tour["probes"].values():
        assert probe.score > probe.control + 0.1


def test_model_of_the_tour_is_the_same_after_its_export(tour):
    assert np.ptp(tour["logits_BTV"]) > 1
    np.testing.assert_array_equal(tour["logits_BTV"], tour["loaded_BTV"])
    with pytest.raises(ValueError, match=r"params: \S+ is "):
        as_trained(tour["config"], tour["run"].vocab, tour["params"])
