import io
import json
import math
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from launching import WarmLauncher
from rich.console import Console

from charlstm.bench import report
from charlstm.bench.cases import Case
from charlstm.bench.race import Timing, Worker
from charlstm.bench.sections import FULL, QUICK, growth_cases, random_text
from charlstm.bench.worker import CONTENDERS, peak_bytes
from charlstm.errors import RunError

CASE = Case("train", 2, 3, hidden_size=4, vocab_size=5, num_layers=1)
PNG = b"\x89PNG\r\n"
PRODUCT = Timing((0.5, 1.0, 0.5), peak_bytes=2**20, value=1e6, given="a product")
TIMINGS = {
    "charlstm": Timing((0.010, 0.020, 0.010), 200 * 2**20, 1.6, "ours"),
    "torch": Timing((0.015, 0.030, 0.025), 100 * 2**20, 1.6, "its best"),
    "matmul": PRODUCT,
}


def bench(*flags, cwd):
    command = [sys.executable, str(ROOT / "launch/bench.py"), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


# --- the limit ---


def test_the_products_of_a_step_are_those_counted_by_hand():
    # 6 rows: 4 sums of 4 terms for each of 4 gates, and 5 sums of 4 terms; a term is 2 operations.
    gates, dense = 6 * 16 * 4 * 2, 6 * 5 * 4 * 2
    assert report.product_flops(CASE) == 3 * (gates + dense)
    # A layer above another has that one's 4 units to read as well as its own.
    two = CASE._replace(num_layers=2)
    assert report.product_flops(two) == 3 * (gates + 2 * gates + dense)


def test_the_limit_at_160_gflops_is_17_and_135_ms():
    product = Timing((1.0,), 0, value=160e9, given="")
    for batch_size, seq_len, wanted in ((32, 50, 0.017), (128, 100, 0.135)):
        case = Case("train", batch_size, seq_len, 256, 70, 1)
        [seconds] = report.limit_timing(product, case).seconds
        assert abs(seconds - wanted) < 0.001


# --- figures ---


def test_a_ratio_is_of_the_same_round():
    # Twice as slow in the second round, both of them: the medians alone would say 1.25.
    assert report.paired_ratio([1.0, 3.0, 2.5], [1.0, 2.0, 2.0]) == 1.25
    assert report.paired_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0


@pytest.mark.parametrize("values", [[3.0], [1.0, 5.0], [5.0, 1.0, 3.0]])
def test_quartiles_lie_about_the_median(values):
    low, median, high = report.quartiles(values)
    assert min(values) <= low <= median == 3.0 <= high <= max(values)


def test_the_figures_of_a_case():
    summary = report.summarise(TIMINGS, CASE)
    ours, peer, limit = (summary["results"][name] for name in ("charlstm", "torch", "matmul"))
    assert ours["median_seconds"] == 0.010
    assert ours["characters_per_second"] == 6 / 0.010
    assert ours["time_over_ours"] == 1
    assert peer["time_over_ours"] == 1.5
    # 3,024 operations at 2 million a second.
    assert limit["median_seconds"] == pytest.approx(0.001512)
    assert ours["share_of_limit"] == pytest.approx(0.1512)
    assert limit["share_of_limit"] == 1
    assert json.loads(json.dumps(summary, allow_nan=False))["case"]["characters"] == 6


def test_the_figures_of_the_loop():
    rounds = [
        {"command_seconds": 11.0, "startup_seconds": 2.0, "bare_seconds": 8.0, "peak_bytes": 1},
        {"command_seconds": 24.0, "startup_seconds": 4.0, "bare_seconds": 16.0, "peak_bytes": 3},
        {"command_seconds": 10.0, "startup_seconds": 2.0, "bare_seconds": 8.0, "peak_bytes": 2},
    ]
    figures = report.summarise_loop(rounds)
    assert figures["command_over_startup_and_bare"] == pytest.approx(1.1)
    assert figures["median_command_seconds"] == 11.0
    assert figures["median_peak_bytes"] == 2


# --- what is shown ---


def printed(show, *arguments):
    stream = io.StringIO()
    show(Console(file=stream, width=110), *arguments)
    return stream.getvalue()


def test_the_table_has_every_contender_and_what_it_was_given():
    text = printed(report.show_races, "step", [report.summarise(TIMINGS, CASE)])
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    assert ["", "2x3x4", "charlstm", "10.0", "10.0-15.0", "600", "1.00", "200", "15%", ""] in rows
    assert ["", "", "torch", "25.0", "20.0-27.5", "240", "1.50", "100", "10%", ""] in rows
    assert "products alone" in text
    assert "torch: its best" in text
    assert "V=5, N=1; medians of 3" in text


def test_the_table_of_known_sources_has_the_limit_and_the_distance():
    row = {"source": "coins", "vocab_size": 2, "entropy_rate": 1.0, "bits_per_char": 1.0123}
    row |= {"excess": 0.0123, "characters_read": 5000, "seconds": 3.2}
    lines = printed(report.show_entropy, [row]).splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert ["", "coins", "2", "1.0000", "1.0123", "1.23%", "5,000", "3", ""] in rows


def test_only_training_steps_have_a_limit():
    timings = {name: timing for name, timing in TIMINGS.items() if name != "matmul"}
    races = [report.summarise(timings, CASE._replace(task="generate"))]
    assert "limit" not in printed(report.show_races, "generate", races)


def test_growth_changes_one_size_at_a_time():
    base = Case("train", 16, 100, 256, 70, 1)
    cases = growth_cases(base, FULL.factors, FULL.max_layers)
    assert len(set(cases)) == len(cases)
    assert cases[0] == base
    changed = [
        [name for name in Case._fields if getattr(case, name) != getattr(base, name)]
        for case in cases[1:]
    ]
    assert all(len(names) == 1 for names in changed)
    for size in report.AXES:
        assert changed.count([size]) >= 3
    assert len(growth_cases(base, QUICK.factors, QUICK.max_layers)) == 6


def test_growth_is_drawn_from_the_figures():
    cases = growth_cases(CASE, (1, 2), 2)
    races = [report.summarise(TIMINGS, case) for case in cases]
    # As bench.json has them, so that the picture can be drawn again.
    races = json.loads(json.dumps(races))
    assert report.draw_growth(races, CASE, "a machine").startswith(PNG)


def test_a_made_up_text_has_its_vocabulary():
    text = random_text(1000, 70)
    assert len(text) == 1000
    assert len(set(text)) == 70
    assert text == text.lower()


# --- contenders ---


def test_the_memory_of_a_process_is_what_it_has_held():
    assert 10 * 2**20 < peak_bytes() < 2**40


def test_a_contender_that_fails_is_named_with_its_reason():
    worker = Worker("nonsense")
    try:
        with pytest.raises(RunError, match=r"nonsense failed: .*No module named 'nonsense'"):
            worker.ask("ready")
    finally:
        worker.close()


@pytest.mark.parametrize("peer", ["torch", "keras"])
def test_a_peer_does_the_work_it_is_timed_for(peer):
    pytest.importorskip(peer)
    case = Case("train", 4, 6, hidden_size=16, vocab_size=7, num_layers=2)
    call, given = CONTENDERS[peer](case)
    assert "one-hot" in given
    losses = [call() for _ in range(10)]
    # Nats of a guess among 7, and then of a better one.
    assert abs(losses[0] - math.log(7)) < 0.2
    assert losses[-1] < losses[0]
    call, _ = CONTENDERS[peer](case._replace(task="generate"))
    assert call() == 4 * 6


def test_torch_reads_a_held_out_text_as_we_do():
    pytest.importorskip("torch")
    case = Case("evaluate", 3, 5, hidden_size=8, vocab_size=7, num_layers=1, num_characters=100)
    # Untrained both, so both know nothing about characters that are drawn at random.
    for name in ("torch", "charlstm"):
        call, _ = CONTENDERS[name](case)
        assert abs(call() - math.log(7)) < 0.1


# --- the launcher ---

MISTAKES = [
    ("--shapes=32x50", "--shapes=32x50: must be BxTxH"),
    ("--shapes=32x50x256,0x1x1", "--shapes=0x1x1: must be BxTxH"),
    ("--base=small", "--base=small: must be BxTxH"),
    ("--texts=1,many", "--texts=many: must be whole numbers"),
    ("--what=stepp", "--what=stepp: must be of step, growth"),
    ("--what=quality --minutes=0", "--minutes=0.0: must be a number above 0"),
    ("--what=quality --minutes=nan", "--minutes=nan: must be a number above 0"),
    ("--what=quality --text=none.txt", "none.txt: no such file; give --text=FILE"),
    ("--minutes=3", "--minutes=3.0: is for --what=quality, which is not given"),
    ("--what=step --text=.", "--text=.: is for --what=quality, which is not given"),
    ("--peers=mxnet", "--peers=mxnet: must be auto, none, or of torch, keras"),
    ("--repeats=0", "repeats"),
]


@pytest.fixture(scope="module")
def launch():
    warm = WarmLauncher("absl.app", "ml_collections.config_flags", "numpy", "rich.console")
    yield warm
    warm.close()


@pytest.mark.parametrize(("flag", "message"), MISTAKES)
def test_a_mistake_is_one_line_that_helps(flag, message, tmp_path, launch):
    result = launch("bench", *flag.split(), cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    assert os.listdir(tmp_path) == []


def test_a_peer_asked_for_by_name_has_to_be_there(tmp_path):
    program = (
        "import importlib.util, runpy, sys; find = importlib.util.find_spec; "
        "importlib.util.find_spec = lambda name, *rest: "
        "None if name == 'torch' else find(name, *rest); "
        f"sys.argv = ['bench.py', '--peers=torch']; "
        f"runpy.run_path({str(ROOT / 'launch/bench.py')!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2, result.stderr
    assert "--peers=torch: not installed; pip install -e '.[peers]'" in result.stderr


def test_a_section_of_a_tiny_run(tmp_path):
    sizes = "--shapes=2x4x8", "--vocab_size=5", "--repeats=1", "--what=step"
    result = bench("--quick", "--peers=none", "--out=out", *sizes, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    report = json.loads((tmp_path / "out/bench.json").read_text())
    [race] = report["step"]
    ours, twin = (race["results"][name] for name in ("charlstm", "flax"))
    assert ours["value"] == pytest.approx(twin["value"], abs=1e-4)
    assert ours["value"] == pytest.approx(math.log(5), abs=0.2)


@pytest.mark.slow
def test_entropy_alone(tmp_path):
    result = bench("--quick", "--what=entropy", "--peers=none", "--out=out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out/bench.json").read_text())
    assert [learnt["excess"] < 0.02 for learnt in report["entropy"]] == [True, True]
    assert "step" not in report


@pytest.mark.slow
def test_all_sections_of_a_tiny_run(tmp_path):
    sizes = "--shapes=2x4x8", "--base=2x4x8", "--vocab_size=5", "--repeats=1", "--loop_steps=3"
    sections = "--what=step,growth,generate,evaluate,startup,loop"
    result = bench("--quick", "--peers=none", "--out=out", sections, *sizes, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    report = json.loads((tmp_path / "out/bench.json").read_text())
    assert report["settings"]["shapes"] == [[2, 4, 8]]
    assert report["versions"].keys() >= {"jax", "flax", "charlstm"}
    for section in ("step", "generate", "evaluate", "growth"):
        for race in report[section]:
            # The same weights and the same characters, so the same loss.
            ours, twin = (race["results"][name] for name in ("charlstm", "flax"))
            assert ours["value"] == pytest.approx(twin["value"], abs=1e-4)
            assert ours["peak_bytes"] > 2**20
    assert report["step"][0]["results"]["charlstm"]["value"] == pytest.approx(math.log(5), abs=0.2)
    assert report["loop"]["rounds"][0]["command_seconds"] > 0
    assert report["startup"]["median_seconds"].keys() == {"cold", "warm"}
    assert (tmp_path / "out/bench.png").read_bytes().startswith(PNG)
    assert "products alone" in result.stdout
    assert max(map(len, result.stdout.splitlines()[2:])) <= 110
    assert sorted(os.listdir(tmp_path)) == ["out"]
