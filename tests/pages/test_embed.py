"""Pages: hostile data stay data, and no other file is replaced."""

import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest

from charlstm.errors import UserError
from charlstm.pages import embed

HOSTILE = [
    "</script><script>alert(1)</script>",
    "</SCRIPT >",
    "<!-- <script>",
    "]]>",
    "a\u2028b\u2029c",
    "nul \0 bell \x07 delete \x7f",
    "lone \ud800 and \udfff",
    "\"quoted\" 'quoted' `${quoted}` \\ \\u003c",
    "&lt;b&gt; &amp;",
    "\u202eright-to-left\u202c \u05e9\u05dc\u05d5\u05dd",
    "emoji \U0001f469\u200d\U0001f4bb, \ufffd, \ufeff",
    "__proto__",
]
DATA = {"texts": HOSTILE, "names": {text: index for index, text in enumerate(HOSTILE)}}
TEMPLATE = """<!doctype html>
<meta charset="utf-8">
<meta name="generator" content="charlstm">
<title>t</title>
<script id="data" type="application/json"></script>
<p id="after">after</p>
"""


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Return a function that writes data with a small template and returns the file."""
    (tmp_path / "small.html").write_text(TEMPLATE, encoding="utf-8")
    monkeypatch.setattr(embed, "__file__", str(tmp_path / "embed.py"))

    def write(data):
        embed.write_page("small.html", data, tmp_path / "out.html")
        return tmp_path / "out.html"

    return write


class Elements(HTMLParser):
    """Collects the tags of a page, and the content of its scripts."""

    def __init__(self):
        super().__init__()
        self.tags, self.scripts = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script" and data.strip():
            self.scripts.append(data)


def test_hostile_data_stay_within_their_element(page):
    parsed = Elements()
    parsed.feed(page(DATA).read_text(encoding="ascii"))
    assert parsed.tags == ["meta", "meta", "title", "script", "p"]
    assert json.loads(parsed.scripts[0]) == DATA


def test_a_browser_reads_back_hostile_data(page, browser):
    tab = browser.new_page()
    alerts = []
    tab.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    tab.goto(page(DATA).as_uri())
    # As code units, since lone surrogates do not pass through the protocol of the browser.
    read = """() => {
        const data = JSON.parse(document.getElementById("data").textContent);
        const units = text => text.split("").map(unit => unit.charCodeAt(0));
        return [data.texts.map(units), Object.keys(data.names).map(units)];
    }"""
    units = [np.frombuffer(t.encode("utf-16-le", "surrogatepass"), "<u2").tolist() for t in HOSTILE]
    assert tab.evaluate(read) == [units, units]
    assert tab.locator("script").count() == 1
    assert tab.locator("#after").inner_text() == "after"
    assert alerts == []
    tab.close()


def test_nan_is_null_and_infinity_is_refused():
    data = {"bits": np.array([math.nan, 1.5]), "one": np.float32("nan"), "nested": [(math.nan, 2)]}
    assert json.loads(embed.to_json(data)) == {
        "bits": [None, 1.5],
        "one": None,
        "nested": [[None, 2]],
    }
    for bad in (math.inf, np.array([1.0, -np.inf])):
        with pytest.raises(ValueError, match="not JSON compliant"):
            embed.to_json({"x": bad})


def test_a_page_replaces_only_pages(page, tmp_path):
    page("first")
    assert '"second"' in page("second").read_text()
    (tmp_path / "book.txt").write_text("my book")
    for name in ("book.txt", "missing/out.html", "."):
        with pytest.raises(UserError, match="out"):
            embed.write_page("small.html", "data", tmp_path / name)
    assert (tmp_path / "book.txt").read_text() == "my book"
    assert {path.name for path in tmp_path.iterdir()} == {"small.html", "out.html", "book.txt"}


def test_a_failed_page_leaves_the_earlier_one(page):
    page_path = page("first")
    before = page_path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        page(math.inf)
    assert page_path.read_bytes() == before
