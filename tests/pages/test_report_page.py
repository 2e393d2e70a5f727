"""The report of a run, in a browser."""

import json
import shutil
from pathlib import Path

import pytest
from etils import epath
from helpers import small_config, untrained_run

from charlstm.pages import sections
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
    return folder


@pytest.fixture(scope="module")
def report(hostile_run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "NUM_TEXTS", 2)
        patch.setattr(sections, "TEXT_CHARS", 30)
        return write_report(hostile_run / NAME)


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


def test_run_without_its_text_names_what_is_left_out(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "moved")
    page = write_report(tmp_path / "moved", out=tmp_path / "page.html").read_text()
    assert page.count("book.txt: no such file") >= 2
    assert (tmp_path / "moved").exists()
    assert not (tmp_path / "moved" / "report.html").exists()


def test_labels_of_runs_differ():
    folders = [epath.Path(name) for name in ("a/x", "b/x", "c/y")]
    assert labels(folders) == ["a/x", "b/x", "y"]
