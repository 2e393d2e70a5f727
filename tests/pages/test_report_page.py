"""The report of a run, in a browser."""

import base64
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from helpers import small_config, untrained_run

from charlstm.lstm.reference import LayerStates
from charlstm.pages import held_out, sections
from charlstm.pages.report import labels, write_report

FIXTURE = Path(__file__).parent.parent / "fixtures" / "run_schema_1"
HOSTILE = (
    "</script><script>document.title = 'broken'</script> <img src=x onerror=alert(1)> <!-- "
    "\"double\" 'single' &lt; \u202eturned\u202c \u05e9\u05dc\u05d5\u05dd \U0001f469 "
    "nul \0 bell \x07 separators \u2028 \u2029 unknown \ufffd\n"
)
NAME = '<b>run "it\'s" \u202e\U0001f600'


def record_of(step, **more):
    return {"step": step, "epoch": step / 10, "seconds": 2.0 * step} | more


def write_records(workdir, num_evaluations=3):
    records = []
    for step in range(1, num_evaluations + 1):
        bits = 6.0 - step
        training = {"train/bits_per_char": bits, "learning_rate": 0.01 / step, "grad_norm": 1.0}
        records += [record_of(step, **training)]
        evaluation = {"val/bits_per_char": bits, "prompt": f"{step}>", "sample": HOSTILE * step}
        records += [record_of(step, **evaluation)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (workdir / "metrics.jsonl").write_text(lines)


class Tab:
    """A page in a browser, with all that it reports, requests and asks."""

    def __init__(self, browser, path, **options):
        self.errors, self.requests = [], []
        self.page = browser.new_page(**options)
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: (self.errors.append("dialog"), dialog.dismiss()))
        self.page.goto(Path(path).as_uri())
        self.page.wait_for_selector("body[data-ready]", timeout=20_000)

    def text(self, selector):
        return self.page.locator(selector).first.text_content()

    def slide(self, selector, value):
        self.page.locator(selector).fill(str(value))


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    """Return a folder with a run of hostile name, text and samples."""
    folder = tmp_path_factory.mktemp("report")
    path = folder / 'text "<i>".txt'
    path.write_text(HOSTILE * 60, encoding="utf-8")
    run = untrained_run(small_config(path, **{"model.num_layers": 2}), folder / NAME)
    write_records(run.workdir)
    shutil.copytree(run.workdir, folder / "second")
    return folder


@pytest.fixture(scope="module")
def report(hostile_run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "NUM_TEXTS", 2)
        patch.setattr(sections, "TEXT_CHARS", 30)
        return write_report(hostile_run / NAME, compare=[hostile_run / "second"])


@pytest.fixture(scope="module")
def tab(browser, report):
    tab = Tab(browser, report)
    yield tab
    tab.page.close()


def test_page_renders_and_requests_only_itself(tab, report):
    assert tab.page.locator("main > section").count() >= 4
    assert "Left out" not in tab.text("main")
    assert tab.errors == []
    assert tab.requests == [Path(report).as_uri()]


def test_hostile_names_and_texts_appear_as_text(tab):
    assert tab.text("h1") == '<b>run "it\'s" [U+202E]\U0001f600'
    assert tab.page.title().startswith("<b>run")
    assert tab.page.locator("img, h1 b, main script").count() == 0
    shown = tab.text("#sample")
    for part in (
        "</script><script>",
        "<img src=x",
        "\u05e9\u05dc\u05d5\u05dd",
        "\U0001f469",
        "&lt;",
    ):
        assert part in shown
    # Signs stand for characters that are invisible or change the order of the text.
    for part in ("\0", "\x07", "\u202e", "\u2028"):
        assert part not in shown
    assert "nul \u2400 bell \u2407" in shown


def test_slider_shows_the_samples_in_order(tab):
    for index in range(3):
        tab.slide("#samples input", index)
        assert tab.text("#samples output").startswith(f"step {index + 1}, {5 - index}.000")
        assert tab.text("#sample").count("broken") == index + 1


def test_curves_of_compared_runs_share_a_plot(tab):
    legend = tab.page.locator("#curves .legend span")
    assert legend.nth(1).text_content() == "second"
    # Training and validation of two runs.
    assert tab.page.locator("#curves svg").first.locator("polyline").count() == 4
    tab.page.locator("#curves input[value=seconds]").check()
    assert "seconds" in tab.page.locator("#curves svg").first.get_attribute("aria-label")
    assert tab.errors == []


def test_pointer_shows_what_the_model_expected(tab):
    panel = "#surprise .panel"
    tab.page.locator("#surprise .chars span").nth(40).hover()
    assert [tab.page.locator(f"{panel} tr").nth(row).text_content()[:4] for row in range(4)] == [
        "surp",
        "prob",
        "rank",
        "entr",
    ]
    assert tab.page.locator(f"{panel} .bars i").count() == 5
    before = tab.text(panel)
    tab.page.locator("#surprise .chars").press("ArrowRight")
    assert tab.page.locator("#surprise .chosen").count() == 1
    assert tab.text(panel) != before


def test_unit_slider_colours_the_page(tab):
    span = tab.page.locator("#units .chars span").nth(40)
    seen = set()
    for unit in range(3):
        tab.slide("#units input[type=range]", unit)
        seen.add((tab.text("#units b"), span.get_attribute("style")))
    assert len(seen) == 3
    # A gate is between 0 and 1, and the panel shows all values of the unit.
    tab.page.locator("#units select").last.select_option(label="forget gate")
    assert "closed: 0" in tab.text("#units .note:has(.scale)")
    span.hover()
    rows = tab.page.locator("#units .panel tr")
    values = [float(rows.nth(row).locator("td").last.text_content()) for row in range(4)]
    assert all(0 <= value <= 1 for value in values[1:])


def test_states_survive_packing():
    rng = np.random.default_rng(0)
    shape = 1, 7, 5
    fields = {name: rng.normal(size=shape[1:]).astype(np.float32) for name in LayerStates._fields}
    for name in held_out.GATES.values():
        fields[name] = rng.uniform(size=shape[1:]).astype(np.float32)
    packed, scale_K = held_out.pack_states((LayerStates(**fields),), 2, np.array([3, 1]))
    raw = np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8).reshape(4, 2, 5)
    cells_KM = (raw[0] / held_out.CELL_LEVELS * 2 - 1) * scale_K[:, None]
    wanted_KM = fields["c_BTH"][2:, [3, 1]].T
    # Rounding is off by half a level.
    half = scale_K[:, None] / held_out.CELL_LEVELS
    assert np.all(np.abs(cells_KM - wanted_KM) <= half * 1.001)
    for number, name in enumerate(held_out.GATES.values(), start=1):
        gate_KM = fields[name][2:, [3, 1]].T
        assert np.abs(raw[number] / held_out.GATE_LEVELS - gate_KM).max() <= 0.501 / 15


@pytest.mark.parametrize(
    ("text", "length", "wanted"),
    [
        ("short", 10, slice(0, 5)),
        ("one\n\ntwo\n\nthree\n\nfour five", 6, slice(17, 23)),
        ("x" * 20, 6, slice(10, 16)),
        ("x" * 30 + "\n" + "y" * 18 + "\n" + "z" * 10, 20, slice(31, 50)),
    ],
)
def test_page_begins_at_a_paragraph_after_the_middle(text, length, wanted):
    assert held_out.choose_page(text, length) == wanted


def test_run_without_its_text_names_what_is_left_out(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "moved")
    page = write_report(tmp_path / "moved", out=tmp_path / "page.html").read_text()
    assert page.count("book.txt: no such file") >= 2
    assert (tmp_path / "moved").exists()
    assert not (tmp_path / "moved" / "report.html").exists()


def test_labels_of_runs_differ():
    folders = [epath.Path(name) for name in ("a/x", "b/x", "c/y")]
    assert labels(folders) == ["a/x", "b/x", "y"]
