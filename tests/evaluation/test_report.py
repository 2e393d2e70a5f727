"""The report of an evaluation: baselines, table and comparison."""

import math

import numpy as np
import pytest

from charlstm.data.vocab import Vocab
from charlstm.errors import RunError
from charlstm.evaluation import report


def test_compare_names_the_baselines_that_are_worse():
    bits = {"uniform": 6.0, "5-gram": 2.5, "xz": 2.0}
    assert not any(name in report.compare(7.0, bits) for name in bits)
    worse, others = report.compare(2.1, bits).split("not")
    assert "uniform" in worse
    assert "5-gram" in worse
    assert "xz" in others
    assert "25.0%" in report.compare(1.5, bits)
    assert "xz" in report.compare(1.5, bits)


def test_compressors_need_a_long_text():
    vocab, ids_M = Vocab("ab"), np.arange(2000) % 2
    for size, wanted in ((499, False), (500, True)):
        found = report.measure_baselines(ids_M, ids_M[:size], vocab)["bits_per_char"]
        assert ("gzip -9" in found) == wanted
        assert "5-gram" in found


def test_report_states_how_much_the_baselines_read():
    row = {name: 1.25 for name in report.COLUMNS} | {"standard_error": None}
    found = {"training_characters": 10, "held_out_characters": 5, "bits_per_char": {"uniform": 2.0}}
    metrics = row | {"text": "a.txt", "characters": 4, "perplexity": 2.4, "baselines": found}
    metrics["cold"] = row | {"window": 8}
    whole = "\n".join(report.format_report(metrics, 10, 5)).splitlines()
    cut = "\n".join(report.format_report(metrics, 1000, 5)).splitlines()
    [line] = [line for line in cut if line not in whole]
    assert " 10 " in line
    assert " 1,000" in line
    assert ["uniform", "2.0000"] in [line.split() for line in whole]


def test_metrics_that_are_not_finite_are_refused():
    report.check_finite({"text": "a", "loss": 1.0, "cold": {"error": None, "loss": 2.0}}, "a")
    for bad in (math.nan, math.inf):
        with pytest.raises(RunError, match="a: loss is "):
            report.check_finite({"text": "a", "cold": {"loss": bad}}, "a")
