"""The page that writes: its engine against the model, in node and in a browser, and its text."""

import json
import re
import shutil
import subprocess
from functools import partial

import jax
import numpy as np
import pytest
from etils import epath
from helpers import random_params, small_config

from charlstm.exchange import html
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
      return { written, ...(await engine.read(whole)) };
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
    shares = dict(found["next"])
    assert len(shares) == 10
    best = np.sort(wanted_MV[-1])[::-1][:10]
    np.testing.assert_allclose(list(shares.values()), best, atol=tolerance)
    if weights == "float32":
        greedy = trained.run.vocab.decode(wanted_MV[len(text) - 1 : -1].argmax(axis=1))
        assert "".join(characters) == greedy
