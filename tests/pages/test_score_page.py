"""The page of scored texts, in a browser."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from etils import epath

from charlstm import Vocab
from charlstm.errors import UserError
from charlstm.evaluation.score import Scored, Totals
from charlstm.evaluation.surprise import Predictions
from charlstm.evaluation.units import Piece
from charlstm.pages import score
from charlstm.runs.folder import load_run

HOSTILE = (
    "</script><script>document.title = 'broken'</script> <img src=x onerror=alert(1)>\n"
    '"quoted" &lt; \u202eturned\u202c \u05e9\u05dc\u05d5\u05dd \U0001f469 nul \0 bell \x07 \u2028\n'
)
NAME = '<b>"it\'s" \u202e\U0001f600.txt'


def scored(name, text, vocab):
    """Return a text in two pieces, whose character number m has m bits and the rank m."""
    bits_M = np.arange(len(text), dtype=np.float32)
    top_ids_MK = np.tile(vocab.encode("</")[None], (len(text), 1))
    top_probs_MK = np.tile([[0.75, 0.125]], (len(text), 1))
    rank_M = np.arange(len(text))
    bits_M[:1] = np.nan
    leaves = bits_M, bits_M / 2, rank_M, top_ids_MK, top_probs_MK
    pieces = [
        Piece(text[part], Predictions(*(leaf[part] for leaf in leaves)))
        for part in (slice(0, 7), slice(7, None))
    ]
    return Scored(name, iter(pieces), Totals(len(text) - 1, float(np.nansum(bits_M)), len(text)))


@pytest.fixture(scope="module")
def run():
    run = load_run(epath.Path(ROOT / "tests" / "fixtures" / "run_schema_1"))
    return run._replace(vocab=Vocab(sorted({*HOSTILE, *"short"})), workdir=epath.Path(NAME))


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("score") / "page.html"
    texts = [scored(NAME, HOSTILE, run.vocab), scored("short.txt", "short t", run.vocab)]
    score.write_score_page(texts, run, "word", out)
    return out


@pytest.fixture(scope="module")
def tab(browser, written):
    """Return the page in a browser, with what it reports and requests in `events`."""
    tab = browser.new_page()
    tab.events = []
    tab.on("console", lambda message: tab.events.append(message.text))
    tab.on("pageerror", lambda error: tab.events.append(str(error)))
    tab.on("request", lambda request: tab.events.append(request.url))
    tab.on("dialog", lambda dialog: (tab.events.append("dialog"), dialog.dismiss()))
    tab.goto(Path(written).as_uri())
    tab.wait_for_selector("body[data-ready]", timeout=20_000)
    yield tab
    tab.close()


def colours_of(tab):
    """Return how much colour each character has, 0 to 1."""
    script = "spans => spans.map(span => Number(span.style.getPropertyValue('--much')))"
    return tab.locator("#text span").evaluate_all(script)


def test_hostile_text_is_shown_as_text(tab, written):
    assert tab.events == [Path(written).as_uri()]
    shown = tab.text_content("#text")
    signs = {"\n": "\u21b5", "\0": "\u2400", "\x07": "\u2407"}
    signs |= {char: f"[U+{ord(char):04X}]" for char in "\u202e\u202c\u2028"}
    assert shown == "".join(signs.get(char, char) for char in HOSTILE)
    assert tab.text_content("h1") == NAME.replace("\u202e", "[U+202E]")
    assert tab.locator("img, main script, h1 b").count() == 0
    assert tab.title() == f"Surprise: {tab.text_content('h1')}"


def test_pointer_and_keys_show_the_predictions(tab):
    tab.hover("#text span >> nth=10")
    details = tab.text_content("#details")
    for part in ("10.00 bits", "number 10 ", "5.00 bits were expected", "75.0 %", "12.5 %"):
        assert part in details
    tab.focus("#text")
    tab.keyboard.press("ArrowRight")
    assert "11.00 bits" in tab.text_content("#details")
    tab.hover("#text span >> nth=0")
    assert "Not predicted" in tab.text_content("#details")


def test_colours_are_those_of_the_chosen_units(tab):
    tab.select_option("#choice", "1")
    assert tab.text_content("#text") == "short t"
    tab.check("input[value=char]")
    assert colours_of(tab) == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    # The means of both words, without the first character, by the 6 bits of the full colour.
    tab.check("input[value=word]")
    assert colours_of(tab) == [*[3 / 6] * 6, 6 / 6]
    assert tab.locator("#ranking li").all_text_contents() == ["short 15.00", "t 6.00"]
    assert "3.500" in tab.text_content("#totals")
    tab.select_option("#choice", "0")


def test_the_ranking_leads_to_the_most_surprising_line(tab):
    tab.check("input[value=line]")
    assert tab.locator("#ranking li").count() == 2
    tab.click("#ranking button >> nth=0")
    assert f" {HOSTILE.index(chr(10)) + 1}.00 bits" in f" {tab.text_content('#details')[1:]}"


def test_a_page_has_a_limit(run, tmp_path, monkeypatch):
    monkeypatch.setattr(score, "MAX_CHARS", 12)
    texts = [scored(name, "short t", run.vocab) for name in ("a.txt", "b.txt")]
    with pytest.raises(UserError, match=r"b\.txt: .* 12 characters"):
        score.write_score_page(texts, run, "char", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
