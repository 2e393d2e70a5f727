"""The page that writes: its engine against the model, in node and in a browser, and its text."""

import base64
import json
import re
import shutil
import subprocess
from functools import partial

import jax
import numpy as np
import pytest
from conftest import ROOT
from etils import epath
from helpers import random_params, small_config

from charlstm import Vocab
from charlstm.data.cleaning import Cleaning
from charlstm.data.vocab import END
from charlstm.errors import UserError
from charlstm.exchange import html
from charlstm.exchange.export import export
from charlstm.exchange.folder import Trained
from charlstm.model import model_from_config, predict, zero_carry
from charlstm.training.setup import prepare

KINDS = {
    "plain": {"model.multiplicative": False, "model.recurrent_rms_norm": False},
    "default": {"model.num_layers": 2},
    "scaled": {"model.input": "scaled", "model.hidden_size": 5},
    "embedded": {
        "model.input": "embed",
        "model.embed_size": 7,
        "model.tie_embeddings": True,
        "model.num_layers": 2,
        "data.document_separator": "castle",
    },
}
# Reads and continues a text; `engine` is in scope.
PROGRAM = """
    async text => {
      const written = [];
      for await (const { character, bits } of engine.write(text, { temperature: 0, length: 40 })) {
        written.push([character, bits]);
      }
      const whole = text + written.map(([character]) => character).join("");
      await engine.read(whole.slice(0, 50));
      await engine.read(whole.slice(0, 50) + "aaaa");
      const found = await engine.read(whole), { tanh } = Math;
      let calls = 0;
      Math.tanh = value => (calls++, tanh(value));
      await engine.read(whole + text[0]);
      Math.tanh = tanh;
      return { written, calls, ...found };
    }
"""


def make_trained(kind, book_path, workdir):
    """Return a model with random weights, large enough that each of them matters."""
    config = small_config(book_path, **{"model.recurrence": "fused"} | KINDS[kind])
    run = prepare(config, epath.Path(workdir)).run
    model = model_from_config(run.config, run.vocab)
    return Trained(run, model, random_params(model, scale=0.7), {})


def script(page, attributes):
    return re.search(rf"<script {attributes}>(.*?)</script>", page.read_text(), re.DOTALL)[1]


def run_in_node(page, text, tmp_path):
    source = script(page, 'id="engine"')
    data = script(page, 'id="data" type="application/json"')
    program = tmp_path / "program.mjs"
    program.write_text(
        f"{source}\nconst engine = localEngine({data});\n"
        f"console.log(JSON.stringify(await ({PROGRAM})({json.dumps(text)})));"
    )
    answer = subprocess.run(["node", program], capture_output=True, text=True, check=True)
    return json.loads(answer.stdout)


def run_in_browser(browser, page, text):
    tab = browser.new_page()
    tab.goto(page.as_uri())
    tab.wait_for_selector("body[data-ready]")
    found = tab.evaluate(PROGRAM, text)
    tab.close()
    return found


@pytest.mark.parametrize(
    ("kind", "weights", "place"),
    [
        ("plain", "int16", "node"),
        ("default", "float32", "node"),
        ("scaled", "float32", "node"),
        ("embedded", "float32", "node"),
        ("default", "int16", "browser"),
    ],
)
def test_engine_computes_the_model(kind, weights, place, book_path, tmp_path, request):
    trained = make_trained(kind, book_path, tmp_path / "run")
    page, text = tmp_path / "page.html", "the count came to a night \x03in the\n"
    end_id = trained.model.end_id
    text = text if end_id is not None else text.replace("\x03", "")
    html.export(trained, page, weights)
    if place == "browser":
        found = run_in_browser(request.getfixturevalue("browser"), page, text)
    elif shutil.which("node"):
        found = run_in_node(page, text, tmp_path)
    else:
        pytest.skip("no node in PATH: apt-get install nodejs")
    characters, bits = zip(*found["written"], strict=True)
    ids_M = trained.run.vocab.encode(text + "".join(characters))
    call = jax.jit(partial(predict, trained.model))
    logits_MV = call(trained.params, ids_M[None].astype(int), zero_carry(trained.model, 1))[0][0]
    wanted_MV = np.asarray(jax.nn.softmax(logits_MV))
    # float32 differs in the order of sums; the integers are rounded.
    tolerance = 1e-5 if weights == "float32" else 1e-3
    own_M = wanted_MV[np.arange(len(ids_M) - 1), ids_M[1:]]
    assert found["surprise"][0] is None
    np.testing.assert_allclose(0.5 ** np.array(found["surprise"][1:]), own_M, atol=tolerance)
    np.testing.assert_allclose(bits, found["surprise"][len(text) :], atol=1e-4)
    # A longer text is read from where the other one ended, in one step.
    assert found["calls"] == 2 * trained.model.num_layers * trained.model.hidden_size
    shares = dict(found["next"])
    assert len(shares) == 10
    best = np.sort(wanted_MV[-1])[::-1][:10]
    np.testing.assert_allclose(list(shares.values()), best, atol=tolerance)
    if weights == "float32":
        greedy = trained.run.vocab.decode(wanted_MV[len(text) - 1 : -1].argmax(axis=1))
        assert "".join(characters) == greedy


@pytest.mark.parametrize(("weights", "bits"), [("int16", 16), ("int8", 8)])
def test_integers_differ_by_half_a_level_at_most(weights, bits):
    matrix_RC = np.float32(np.random.default_rng(0).normal(size=(5, 7)) * [[1], [9], [0], [1], [1]])
    packed = html._pack(matrix_RC, weights)
    integers = np.frombuffer(base64.b64decode(packed["values"]), weights).reshape(5, 7)
    scales = np.frombuffer(base64.b64decode(packed["scales"]["values"]), np.float32)[:, None]
    level_R = np.abs(matrix_RC).max(axis=1) / (2 ** (bits - 1) - 1)
    errors_R = np.abs(integers * scales - matrix_RC).max(axis=1)
    assert np.all(errors_R <= 0.501 * level_R)


def test_page_of_a_run_stands_beside_its_folder(tmp_path):
    run = shutil.copytree(ROOT / "tests" / "fixtures" / "run_schema_1", tmp_path / "book")
    assert export(f"{run}/", "html", weights="int8") == tmp_path / "book.html"
    with pytest.raises(UserError, match="not a page"):
        export(run, "html", run / "config.json")


def test_weights_that_are_not_finite_are_refused(book_path, tmp_path):
    trained = make_trained("plain", book_path, tmp_path / "run")
    trained.params["dense"]["bias"][0] = np.inf
    with pytest.raises(UserError, match="not finite"):
        html.export(trained, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


# --- the page ---

HOSTILE = (
    "</script><script>document.title = 'broken'</script> <img src=x onerror=alert(1)> <!-- "
    "\u202eturned\u202c \u05e9\u05c1\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 "
    "\U0001f469\u200d\U0001f467 e\u0301 nul \0 bell \x07 \u2028 &lt;\n"
)
SEPARATOR = "END."
NAME = '<b>run "it\'s" \u202e\U0001f600'


@pytest.fixture(scope="module")
def tab(browser, tmp_path_factory):
    """Return the page of a hostile run on documents; `events` has what it reports and requests."""
    folder = tmp_path_factory.mktemp("page")
    path = folder / "text <i>.txt"
    path.write_text((HOSTILE.replace("\0", "") + SEPARATOR) * 60, encoding="utf-8")
    changes = {"model.hidden_size": 8, "data.lowercase": True}
    config = small_config(path, **changes | {"data.document_separator": SEPARATOR})
    run = prepare(config, folder / NAME).run
    run = run._replace(vocab=Vocab(sorted({*HOSTILE.lower(), *CLEANED, END})))
    model = model_from_config(run.config, run.vocab)
    html.export(Trained(run, model, random_params(model), {}), folder / "page.html")
    tab = browser.new_context(permissions=["clipboard-read", "clipboard-write"]).new_page()
    tab.events = []
    tab.on("console", lambda message: tab.events.append(message.text))
    tab.on("pageerror", lambda error: tab.events.append(str(error)))
    tab.on("request", lambda request: tab.events.append(request.url))
    tab.on("dialog", lambda dialog: (tab.events.append("dialog"), dialog.dismiss()))
    tab.url_of_page = (folder / "page.html").as_uri()
    tab.goto(tab.url_of_page)
    tab.wait_for_selector("body[data-ready]")
    yield tab
    tab.context.close()


# A text and what is left of it: the form of a sigma and the length of a dotted I depend on Unicode.
UNCLEANED = "\u039f\u03a3 \u03a3. \u0130x! END.\u00ab\u039f\u03a3\u00bb--END.A\u20145 \u20ac\tend."
CLEANED = "\u03bf\u03c2 \u03c3 i\u0307x \x03\u03bf\u03c2\x03a5 \tend"


def fill(tab, text):
    """Replace the text, and wait until it has been read."""
    tab.fill("#text", "")
    tab.fill("#text", text)
    tab.evaluate("read()")


def write(tab, length):
    """Write, wait until the page is done, and return what it says."""
    tab.fill("#length", str(length))
    tab.click("#write")
    tab.wait_for_selector("#write:not(:text('Stop'))")
    tab.wait_for_selector("#status:text('a second')")
    return tab.text_content("#status")


def parts_of(tab, style):
    """Return the parts of the text with a style of ::highlight()."""
    return tab.evaluate(
        "style => [...(CSS.highlights.get(style) ?? [])]"
        ".map(part => text.slice(part.startOffset, part.endOffset))",
        style,
    )


def test_hostile_names_and_texts_appear_as_text(tab):
    assert tab.text_content("h1") == NAME.replace("\u202e", "[U+202E]")
    assert "text <i>.txt" in tab.text_content("#summary")
    fill(tab, HOSTILE)
    write(tab, 200)
    text = tab.input_value("#text")
    # A browser replaces carriage returns only, which no text of a run has.
    assert text.startswith(HOSTILE)
    assert tab.text_content("#mirror") == text
    assert tab.locator("img, main script, h1 b").count() == 0
    assert tab.title().startswith("Write: <b>run")
    assert "U+202E" in tab.text_content("#counts")
    assert tab.events == [tab.url_of_page]


def test_text_is_cleaned_as_prompts_are(tab):
    cleaning = Cleaning(lowercase=True, strip_punctuation=True, separator=SEPARATOR)
    assert cleaning.apply_to(UNCLEANED) == CLEANED
    found = tab.evaluate("([text, by]) => clean(text, by)", [UNCLEANED, cleaning._asdict()])
    assert "".join(found["characters"]) == END + CLEANED
    places = [UNCLEANED[start:end] for start, end in found["places"]]
    assert places[:10] == ["", *"\u039f\u03a3 \u03a3 ", "\u0130", "\u0130", "x", " "]
    assert places[10:] == [SEPARATOR, *"\u039f\u03a3", SEPARATOR, *"A5 \tend"]


def test_typed_text_is_coloured_by_its_surprise(tab):
    places = [*HOSTILE[HOSTILE.index("\u05e9") : HOSTILE.index(" nul")], SEPARATOR, *"NUL"]
    text = "".join(places)
    fill(tab, text)
    bits = tab.evaluate(
        "async text => (await engine.read(clean(text).characters.join(''))).surprise", text
    )
    # The first is the mark of the document, which precedes the text.
    assert bits[0] is None
    assert len(bits) == len(places) + 1
    for level in range(1, 9):
        pairs = zip(places, bits[1:], strict=True)
        wanted = "".join(place for place, bit in pairs if min(int(bit), 8) == level)
        assert "".join(parts_of(tab, f"bits{level}")) == wanted
    assert parts_of(tab, "written") == []


def test_cursor_shows_what_was_expected_there(tab):
    fill(tab, "turned")
    tab.focus("#text")
    tab.keyboard.press("ArrowLeft")
    tab.evaluate("read()")
    before = tab.evaluate("engine.read('\\x03turne')")["next"]
    rows = tab.locator("#next li")
    assert rows.count() == 10
    assert f"{100 * before[0][1]:.1f}" in rows.first.text_content()
    assert [row.get_attribute("class") for row in rows.all()].count("own") == ("d" in dict(before))
    tab.click("#next li:nth-child(2) button")
    [second, _] = before[1]
    assert tab.input_value("#text") == f"turne{second}d"


def test_unknown_characters_are_named_and_skipped(tab):
    # `fill` would replace a lone surrogate.
    tab.evaluate(r"box.value = 'tu\u00e9rn\ud83d', edit(), read()")
    status = tab.text_content("#notice")
    assert "\u00e9 (U+00E9), U+D83D" in status
    assert "skips" in status
    assert parts_of(tab, "unknown") == ["\u00e9", "\ud83d"]
    assert tab.evaluate("clean(text).characters.join('')") == "\x03turn"


def test_page_stops_continues_and_copies(tab):
    fill(tab, "a turned ")
    tab.check("#slowly")
    tab.fill("#length", "1000")
    tab.click("#write")
    tab.wait_for_selector("#write:text('Stop')")
    tab.keyboard.press("Escape")
    tab.wait_for_selector("#status:text('Stopped')")
    tab.uncheck("#slowly")
    before = tab.input_value("#text")
    assert tab.text_content("#write") == "Continue"
    write(tab, 20)
    after = tab.input_value("#text")
    assert after.startswith(before)
    assert parts_of(tab, "written") == [after.removeprefix("a turned ")]
    tab.click("#copy")
    tab.wait_for_selector("#status:text('Copied')")
    assert tab.evaluate("navigator.clipboard.readText()") == after
    # A change of the text is typed, and ends what is being written.
    fill(tab, after + "!")
    assert parts_of(tab, "written") == []
