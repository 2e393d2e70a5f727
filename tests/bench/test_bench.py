import json
import math
import os
import subprocess
import sys
from concurrent.futures import Future

import jax
import pytest
from conftest import ROOT
from launching import WITHOUT_JAX, WarmLauncher

from charlstm.bench import report, timing
from charlstm.bench.cases import Case
from charlstm.bench.measure import FULL, growth_cases, write_random_text

CASE = Case("train", 2, 3, hidden_size=4, vocab_size=5)
PNG = b"\x89PNG\r\n"


@pytest.fixture(autouse=True)
def _rank_promotion():
    # Keras promotes ranks.
    with jax.numpy_rank_promotion("allow"):
        yield


class FakeProcess:
    """Answers requests with fixed values, notes them in `log`, and fails at one of them."""

    def __init__(self, name, log, fails_at=None):
        self.name, self.log, self.fails_at = name, log, fails_at

    def submit(self, function, *arguments):
        self.log.append((self.name, function.__name__))
        answer = Future()
        if function.__name__ == self.fails_at:
            answer.set_exception(ModuleNotFoundError("No module named 'torch'"))
        else:
            values = {"build": 1.5, "time_round": 0.25, "peak_mib": 100.0, "call": "native"}
            answer.set_result(values.get(function.__name__))
        return answer


# --- interleaving ---


def test_rounds_alternate_in_reversed_order():
    log = []
    processes = {name: FakeProcess(name, log) for name in "abc"}
    results = timing.time_interleaved(processes, CASE, rounds=3, round_seconds=0.1)
    assert [name for name, request in log if request == "time_round"] == list("abccbaabc")
    assert {name for name, request in log[:3]} == set("abc")
    assert [result["ms"] for result in results] == [[250.0] * 3] * 3


def test_result_of_an_automatic_recurrence_names_it():
    processes = {name: FakeProcess(name, []) for name in ("charlstm", "default", "flax")}
    *automatic, flax = timing.time_interleaved(processes, CASE, rounds=1, round_seconds=0.1)
    assert [each["recurrence"] for each in automatic] == ["native"] * 2
    assert "recurrence" not in flax
    assert timing.call(timing.DEFAULT_RECURRENCE) in ("native", "fused")


@pytest.mark.parametrize("request_name", ["build", "calibrate", "time_round", "peak_mib"])
def test_backend_that_fails_does_not_stop_the_others(request_name):
    log = []
    processes = {
        "torch": FakeProcess("torch", log, request_name),
        "keras": FakeProcess("keras", log),
    }
    torch, keras = timing.time_interleaved(processes, CASE, rounds=2, round_seconds=0.1)
    assert "No module named 'torch'" in torch["error"]
    assert log.count(("torch", request_name)) == 1
    assert "error" not in keras
    assert (keras["value"], keras["median_ms"], keras["peak_mib"]) == (1.5, 250.0, 100.0)
    assert "torch" in report.table([torch, keras])


def test_process_that_dies_is_reported():
    with timing.open_processes(["charlstm"]) as processes:
        result, error = timing.try_run("charlstm", processes["charlstm"], os._exit, 3)
    assert result is None
    assert "BrokenProcessPool" in error


# --- statistics ---


def test_ratios_are_within_rounds():
    # Both are twice as slow in the second round; the ratio of the medians is 1.25.
    seconds = {"charlstm": [1.0, 2.0, 2.0], "torch": [1.0, 3.0, 2.5]}
    metrics = timing.summarize(seconds, CASE)
    assert metrics["torch"]["time_over_ours"] == 1.25
    seconds = {"charlstm": [1.0, 10.0, 1.0], "torch": [2.0, 20.0, 2.0]}
    assert timing.summarize(seconds, CASE)["torch"]["time_over_ours"] == 2.0


def test_metrics_of_a_case():
    metrics = timing.summarize({"charlstm": [0.010, 0.020, 0.010]}, CASE)
    ours = metrics["charlstm"]
    assert (ours["low_ms"], ours["median_ms"], ours["high_ms"]) == pytest.approx((10, 10, 15))
    assert ours["chars_per_second"] == pytest.approx(6 / 0.010)
    json.dumps(metrics, allow_nan=False)


def test_growth_cases_differ_in_one_size():
    base, *others = growth_cases(Case("train", 16, 100, 256), FULL.factors)
    differences = [
        [size for size in Case._fields if getattr(case, size) != getattr(base, size)]
        for case in others
    ]
    assert all(len(sizes) == 1 for sizes in differences)
    assert all(differences.count([size]) >= 2 for size in report.SIZES)


def test_size_picture_is_drawn():
    results = [
        {"backend": name, "sizes": case._asdict(), "chars_per_second": 1000.0}
        for case in growth_cases(CASE, (1, 2))
        for name in ("charlstm", "flax")
    ]
    results.append({"backend": "torch", "sizes": CASE._asdict(), "error": "no such module"})
    assert report.size_picture(results, CASE).startswith(PNG)


def test_random_text_has_its_vocabulary(tmp_path):
    text = write_random_text(tmp_path / "text.txt", Case("train", 1, 1, 1), 1000).read_text("utf-8")
    assert (len(text), len(set(text))) == (1000, 70)


# --- backends ---


@pytest.mark.usefixtures("rank_promotion")
@pytest.mark.parametrize("module", ["torch_backend", "keras_backend", "jax_backend"])
def test_backend_learns_and_generates(module):
    pytest.importorskip(module.removesuffix("_backend"))
    case = Case("train", 4, 6, hidden_size=16, vocab_size=7, num_layers=2)
    call = timing.call(f"{module}.build", "charlstm", case)
    losses = [call() for _ in range(10)]
    # An untrained model guesses among 7 characters.
    assert abs(losses[0] - math.log(7)) < 0.2
    assert losses[-1] < losses[0]
    assert timing.call(f"{module}.build", "charlstm", case._replace(task="generate"))() == 4 * 6


@pytest.mark.slow
def test_fused_and_flax_cell_have_the_same_loss():
    plain, flax = (timing.call("jax_backend.build", name, CASE)() for name in ("charlstm", "flax"))
    assert plain == pytest.approx(flax, abs=1e-5)


@pytest.mark.slow
def test_missing_baseline_is_reported_and_the_others_go_on(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module named torch')")
    monkeypatch.syspath_prepend(tmp_path)  # a spawned process inherits it
    with timing.open_processes(["charlstm", "torch"]) as processes:
        ours, torch = timing.time_interleaved(processes, CASE, rounds=1, round_seconds=0.0)
    assert "No module named torch" in torch["error"]
    assert ours["value"] == pytest.approx(math.log(5), abs=0.2)
    assert ours["peak_mib"] > 1


@pytest.mark.parametrize("module", ["torch_backend", "jax_backend"])
def test_backend_evaluates_all_windows(module):
    pytest.importorskip(module.removesuffix("_backend"))
    case = Case("evaluate", 3, 5, hidden_size=8, vocab_size=7, num_windows=6)
    assert case.characters == 90
    assert abs(timing.call(f"{module}.build", "charlstm", case)() - math.log(7)) < 0.1


# --- the launcher ---

MISTAKES = [
    ("--shapes=32x50", "--shapes=32x50", "BxTxH"),
    ("--shapes=32x50x256,0x1x1", "--shapes=0x1x1", "BxTxH"),
    ("--what=stepp", "--what=stepp", "step, growth"),
    ("--what=quality --minutes=0", "--minutes=0.0", "above 0"),
    ("--what=quality --minutes=nan", "--minutes=nan", "above 0"),
    ("--what=quality --text=none.txt", "none.txt: no such file", "--text=FILE"),
    ("--minutes=3", "--minutes=3.0", "--what=quality"),
    ("--what=step --text=.", "--text=.", "--what=quality"),
    ("--peers=mxnet", "--peers=mxnet", "torch, keras"),
    ("--repeats=0", "repeats", "0"),
]


@pytest.fixture(scope="module")
def launch():
    warm = WarmLauncher(*WITHOUT_JAX, "numpy", "rich.console")
    yield warm
    warm.close()


@pytest.mark.parametrize(("flag", "problem", "remedy"), MISTAKES)
def test_mistake_is_one_line(flag, problem, remedy, tmp_path, launch):
    result = launch("bench", *flag.split(), cwd=tmp_path)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert problem in line
    assert remedy in line
    assert result.stdout == ""
    assert os.listdir(tmp_path) == []


def bench(*flags, cwd):
    command = [sys.executable, str(ROOT / "launch/bench.py"), "--quick", "--out=out", *flags]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return json.loads((cwd / "out/bench.json").read_text())


TINY = ("--shapes=4x32x8", "--repeats=1")


@pytest.mark.slow
def test_backends_agree_in_each_section_of_a_tiny_run(tmp_path):
    sections = ("step", "growth", "generate", "evaluate")
    results = bench(*TINY, f"--what={','.join(sections)}", cwd=tmp_path)
    assert (tmp_path / "out/bench.png").read_bytes().startswith(PNG)
    for section in sections:
        entries = [each for each in results[section] if each["backend"] in ("charlstm", "flax")]
        values = {(each["case"], each["backend"]): each["value"] for each in entries}
        assert values
        for case in {case for case, _ in values}:
            # Same weights, same characters, same loss.
            assert values[case, "charlstm"] == pytest.approx(values[case, "flax"], abs=1e-4)


@pytest.mark.slow
def test_loop_serve_and_entropy_of_a_tiny_run(tmp_path):
    results = bench(*TINY, "--what=loop,serve,entropy", cwd=tmp_path)
    assert results["loop"][-1]["round"] == "median"
    assert results["loop"][0]["command_seconds"] > 0
    served = {each["readers"]: each["requests"] for each in results["serve"]}
    assert served["1"] >= 1
    assert served["8"] >= 8
    assert served["8, 2 requests each"] == 16
    assert all(each["chars_per_second"] > 0 for each in results["serve"])
    assert all(each["excess"] < 0.02 for each in results["entropy"])
