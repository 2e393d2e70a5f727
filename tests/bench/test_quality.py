"""Time to quality: bench.py --what=quality."""

import json
import math
import os
import subprocess
import sys
import time
from itertools import pairwise

import jax
import pytest
from conftest import ROOT

from charlstm.bench import cases, report
from charlstm.bench.cases import Checkpoints
from charlstm.bench.measure import recipes, seconds_to
from charlstm.config import base_config

PNG = b"\x89PNG\r\n"
POINTS = [
    {"step": 50, "seconds": 8.0, "bits_per_char": 3.9},
    {"step": 150, "seconds": 18.0, "bits_per_char": 2.5},
    {"step": 350, "seconds": 28.0, "bits_per_char": 2.1},
]


def test_target_is_reached_by_the_first_point_at_or_below_it():
    assert seconds_to(POINTS, 2.5) == 18.0
    assert seconds_to(POINTS, 2.2) == 28.0
    assert seconds_to(POINTS, 2.0) is None
    assert seconds_to([*POINTS, POINTS[0]], 2.1) == 28.0


def test_checkpoints_are_copied_at_growing_intervals(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(cases.time, "time", lambda: now[0])
    checkpoints = Checkpoints(100.0, max_seconds=50.0, spacing=2.0)
    for step in range(1, 20):
        now[0] = 100.0 + 3 * step
        is_over = checkpoints.add(step, lambda step=step: f"weights {step}", is_last=step == 19)
        assert is_over == (3 * step >= 50)
        if is_over:
            break
    assert [copy[:2] for copy in checkpoints.copies] == [
        (1, 3),
        (2, 6),
        (4, 12),
        (8, 24),
        (16, 48),
        (17, 51),
    ]
    points = checkpoints.points(lambda weights: math.log(2) * int(weights.split()[1]))
    assert [point["bits_per_char"] for point in points] == pytest.approx([1, 2, 4, 8, 16, 17])


def test_last_checkpoint_is_always_copied():
    checkpoints = Checkpoints(time.time())
    for step in (1, 2, 3):
        checkpoints.add(step, lambda step=step: step, is_last=step == 3)
    assert [copy[2] for copy in checkpoints.copies] == [1, 3]


def test_scored_batches_are_spread_evenly_or_are_all(monkeypatch):
    monkeypatch.setattr(cases, "SCORED_BATCHES", 5)
    assert list(cases.scored_steps(40, 2)) == [0, 4, 8, 12, 16]
    assert list(cases.scored_steps(5, 2)) == [0, 1, 2]


def test_recipes_hold_out_the_same_text():
    configs = recipes("book.txt", with_keras=True)
    assert {config.data.val_fraction for config in configs.values()} == {0.1}
    assert {config.data.path for config in configs.values()} == {"book.txt"}
    assert [name for name, config in configs.items() if not config.data.lowercase] == ["default"]
    assert "keras" not in recipes("", with_keras=False)


def test_results_are_drawn():
    results = [{"recipe": "default", "points": POINTS}, {"recipe": "keras", "points": []}]
    assert report.quality_picture(results).startswith(PNG)


@pytest.fixture
def rank_promotion():
    # Keras promotes ranks.
    with jax.numpy_rank_promotion("allow"):
        yield


def tiny_config(book_path):
    config = base_config()
    config.batch_size, config.seq_len, config.num_epochs = 128, 30, 2
    config.model.hidden_size = 8
    config.data.path, config.data.lowercase = str(book_path), True
    config.data.order, config.data.loss_on = "windows", "last"
    return config.to_dict()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("backend", "seconds", "num_steps"),
    [
        *(pytest.param(name, 600, 84, marks=pytest.mark.slow) for name in ("jax", "keras")),
        pytest.param("keras", 0, 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("rank_promotion")
def test_backend_trains_until_its_end(backend, seconds, num_steps, book_path):
    pytest.importorskip(backend)
    from importlib import import_module

    train = import_module(f"charlstm.bench.{backend}_backend").train
    points = train(tiny_config(book_path), Checkpoints(time.time(), seconds, 1.1))
    # Of 5,400 characters 5,370 windows, in 42 batches.
    assert points[-1]["step"] == num_steps
    assert all(before["seconds"] < after["seconds"] for before, after in pairwise(points))
    if seconds:
        assert points[-1]["bits_per_char"] < points[0]["bits_per_char"]
    # At first a guess among all characters.
    size = len(set(book_path.read_text().lower()))
    assert points[0]["bits_per_char"] == pytest.approx(math.log2(size), abs=0.7)


@pytest.mark.slow
def test_quality_of_a_short_text(book_path, tmp_path):
    flags = ("--what=quality", f"--text={book_path}", "--minutes=0.4", "--out=out")
    command = [sys.executable, str(ROOT / "launch/bench.py"), *flags]
    result = subprocess.run(
        command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "out/quality.png").read_bytes().startswith(PNG)
    results = json.loads((tmp_path / "out/bench.json").read_text())["quality"]
    assert [each["recipe"] for each in results][:2] == ["default, lower-cased", "default"]
    for each in results:
        assert 0 < each["bits_per_char"] < 5, each["recipe"]
