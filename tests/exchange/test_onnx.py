"""Models as ONNX graphs, run by onnxruntime."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from exchanging import plain_trained

from charlstm.errors import UserError
from charlstm.exchange.onnx import export
from charlstm.model import predict
from charlstm.runs.checkpoints import load_model
from charlstm.runs.folder import load_run

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("cheaply")

PARTS = {"model.multiplicative": True, "model.recurrent_rms_norm": True}
TIED = {"model.input": "embed", "model.embed_size": 5, "model.tie_embeddings": True}
# Settings, and the operator of the recurrence.
KINDS = {
    "plain": ({"model.num_layers": 2}, "LSTM"),
    "plain scaled": ({"model.input": "scaled"}, "LSTM"),
    "default": (PARTS, "Scan"),
    "all parts": (
        PARTS | TIED | {"model.num_layers": 2, "data.document_separator": "\n"},
        "Scan",
    ),
}


def exported_as(kind, book_path, folder):
    """Return a model of random weights, and a session of onnxruntime with its export."""
    trained = plain_trained(book_path, folder / "run", **KINDS[kind][0])
    export(trained, epath.Path(folder / "onnx"))
    return trained, onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")


def random_window(model, num_rows=3, length=12):
    """Return ids_BT and a carry, c_NBH and h_NBH."""
    rng = np.random.default_rng(1)
    shape_NBH = model.num_layers, num_rows, model.hidden_size
    c_NBH, h_NBH = np.float32(rng.normal(size=(2, *shape_NBH)))
    ids_BT = rng.integers(0, model.vocab_size, (num_rows, length))
    if model.end_id is not None:
        ids_BT[1, 4] = model.end_id
    return ids_BT, c_NBH, np.tanh(h_NBH)


def run(session, ids_BT, c_NBH, h_NBH):
    """Return logits_BTV, and the new c_NBH and h_NBH."""
    return session.run(None, {"ids": ids_BT, "c": c_NBH, "h": h_NBH})


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_computes_the_same_window(kind, book_path, tmp_path):
    trained, session = exported_as(kind, book_path, tmp_path)
    ids_BT, *carry = random_window(trained.model)
    logits_BTV, *new_carry = run(session, ids_BT, *carry)
    wanted_BTV, layers = jax.jit(predict, static_argnums=0)(
        trained.model, trained.params, np.int32(ids_BT), tuple(zip(*carry, strict=True))
    )
    assert np.ptp(wanted_BTV) > 1
    # onnxruntime approximates tanh and the logistic function.
    np.testing.assert_allclose(logits_BTV, wanted_BTV, atol=1e-5)
    for found, leaves in zip(new_carry, zip(*layers, strict=True), strict=True):
        np.testing.assert_allclose(found, np.stack(leaves), atol=1e-5)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert KINDS[kind][1] in {node.op_type for node in graph.graph.node}


@pytest.mark.parametrize("kind", ["plain", "all parts"])
def test_character_at_a_time_equals_the_window(kind, book_path, tmp_path):
    trained, session = exported_as(kind, book_path, tmp_path)
    ids_BT, *carry = random_window(trained.model, num_rows=2, length=6)
    wanted_BTV, *wanted_carry = run(session, ids_BT, *carry)
    for time in range(6):
        logits_B1V, *carry = run(session, ids_BT[:, time : time + 1], *carry)
        np.testing.assert_allclose(logits_B1V[:, 0], wanted_BTV[:, time], atol=1e-5)
    np.testing.assert_allclose(carry, wanted_carry, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "default"])
def test_invalid_id_gives_nan_in_its_row_only(kind, book_path, tmp_path):
    trained, session = exported_as(kind, book_path, tmp_path)
    ids_BT, *carry = random_window(trained.model)
    ids_BT[0, 3], ids_BT[2, 0] = trained.model.vocab_size, -1
    for result in run(session, ids_BT, *carry):
        rows = result if result.shape[0] == 3 else result.swapaxes(0, 1)
        assert np.isnan(rows[[0, 2]]).all()
        assert np.isfinite(rows[1]).all()


def test_model_card_writes_text_and_metadata_describe_the_run(
    book_path, tmp_path, monkeypatch, capsys
):
    trained, session = exported_as("default", book_path, tmp_path)
    card = (tmp_path / "onnx" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(card.split("```python\n")[1].split("```")[0], {})
    written = capsys.readouterr().out
    assert len(written) > 200
    assert set(written) <= {*trained.run.vocab, "\n"}
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["vocab.json"]) == list(trained.run.vocab)
    config = json.loads(metadata["config.json"])["config"]
    assert config == trained.run.config.to_dict()


def test_onnx_export_is_refused_as_a_run(book_path, tmp_path):
    exported_as("plain", book_path, tmp_path)
    for read in (load_model, load_run):
        for path in (tmp_path / "onnx", tmp_path / "onnx" / "model.onnx"):
            with pytest.raises(UserError, match=r"onnx.*in a format that charlstm does not read"):
                read(epath.Path(path))
