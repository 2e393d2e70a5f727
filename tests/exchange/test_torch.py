"""Plain LSTMs as a state_dict of torch, and back."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from exchanging import logits_of, plain_trained
from helpers import assert_equal
from safetensors.numpy import load_file, save_file

from charlstm.errors import UserError
from charlstm.evaluation import open_held_out
from charlstm.evaluation.dynamic import make_anchor
from charlstm.evaluation.writing import generate
from charlstm.exchange.plain import check_plain, from_plain, to_plain
from charlstm.exchange.torch import export
from charlstm.lstm import native_library
from charlstm.runs.checkpoints import load_model

pytestmark = pytest.mark.usefixtures("cheaply")

KINDS = {
    "one_hot": {"model.input": "one_hot", "model.num_layers": 2},
    "embed": {"model.input": "embed", "model.embed_size": 5, "model.num_layers": 1},
}


@pytest.fixture(params=KINDS)
def exported(request, book_path, tmp_path):
    """Return a trained plain LSTM and the folder of its export."""
    trained = plain_trained(book_path, tmp_path / "run", **KINDS[request.param])
    export(trained, epath.Path(tmp_path / "torch"))
    return trained, tmp_path / "torch"


def torch_model(trained, folder):
    """Return the module that the model card defines."""
    torch = pytest.importorskip("torch", reason="the extra peers has torch")
    card = (folder / "README.md").read_text()
    source = card.split("```python\n")[1].split("```")[0]
    names = {}
    exec(source.replace('"torch/', f'"{folder}/'), names)
    assert "".join(names["characters"]) == "".join(trained.run.vocab)
    return torch, names["model"]


def test_export_loads_as_the_run(exported):
    trained, folder = exported
    run, model, params = load_model(folder)
    assert_equal(params, jax.device_get(trained.params))
    assert model.clone(dropout_rate=0.5) == trained.model.clone(dropout_rate=0.5)
    assert run.prompts == trained.run.prompts


def test_gates_are_those_of_the_equations_of_torch(exported):
    """Compare with the equations in the documentation of torch.nn.LSTM, in NumPy."""
    trained, folder = exported
    tensors = {name: np.float64(x) for name, x in load_file(folder / "model.safetensors").items()}
    ids_T = np.arange(12) % len(trained.run.vocab)
    layer_TE = tensors.get("embed.weight", np.eye(len(trained.run.vocab)))[ids_T]
    for index in range(trained.model.num_layers):
        w_ih, w_hh, b_ih, b_hh = (
            tensors[f"lstm.{name}_l{index}"]
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h, c, outputs = np.zeros(w_hh.shape[1]), np.zeros(w_hh.shape[1]), []
        for x in layer_TE:
            i, f, g, o = np.split(w_ih @ x + b_ih + w_hh @ h + b_hh, 4)
            i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
            c = f * c + i * np.tanh(g)
            h = o * np.tanh(c)
            outputs.append(h)
        layer_TE = np.array(outputs)
    wanted_TV = layer_TE @ tensors["dense.weight"].T + tensors["dense.bias"]
    found_TV = logits_of(trained.model, trained.params, ids_T[None])[0]
    assert np.ptp(wanted_TV) > 1  # differences of the gates would show
    np.testing.assert_allclose(found_TV, wanted_TV, atol=1e-5)


def test_torch_computes_the_same_logits(exported):
    trained, folder = exported
    torch, model = torch_model(trained, folder)
    ids_BT = np.random.default_rng(1).integers(0, len(trained.run.vocab), (3, 20))
    with torch.no_grad():
        wanted_BTV = model(torch.tensor(ids_BT))[0].numpy()
    found_BTV = logits_of(trained.model, trained.params, ids_BT)
    assert np.ptp(wanted_BTV) > 1
    np.testing.assert_allclose(found_BTV, wanted_BTV, atol=1e-5)


def test_model_trained_in_torch_has_the_same_logits_here(exported):
    trained, folder = exported
    torch, model = torch_model(trained, folder)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    rng = np.random.default_rng(2)
    for _ in range(3):
        ids_BT = torch.tensor(rng.integers(0, len(trained.run.vocab), (3, 20)))
        logits_BTV = model(ids_BT)[0]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT.flatten()).backward()
        optimizer.step()
    from safetensors.torch import save_file as save_torch

    save_torch(model.state_dict(), folder / "model.safetensors")
    _, found, params = load_model(folder)
    with torch.no_grad():
        wanted_BTV = model(ids_BT)[0].numpy()
    found_BTV = logits_of(found, params, ids_BT.numpy())
    np.testing.assert_allclose(found_BTV, wanted_BTV, atol=1e-5)
    assert np.max(np.abs(found_BTV - logits_of(found, trained.params, ids_BT.numpy()))) > 0.1


def test_state_dict_with_other_names_needs_only_a_vocabulary(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(native_library, "choose", lambda *args: "fused")  # nothing to compile
    trained, folder = exported
    names = {"lstm.": "net.rnn.", "dense.": "net.head.", "embed.": "net.table."}
    tensors = load_file(folder / "model.safetensors")
    for old, new in names.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    (tmp_path / "own").mkdir()
    save_file(tensors, tmp_path / "own" / "shakespeare.safetensors")
    with pytest.raises(UserError, match=r"vocab.json: missing or damaged; the weights need it"):
        load_model(tmp_path / "own" / "shakespeare.safetensors")
    shutil.copy(folder / "vocab.json", tmp_path / "own")
    run, model, params = load_model(tmp_path / "own" / "shakespeare.safetensors")
    assert_equal(params, jax.device_get(trained.params))
    # What needs the training text is refused.
    with pytest.raises(UserError, match=r"shakespeare.* give --prompt"):
        generate(run, model, params)
    with pytest.raises(UserError, match=r"shakespeare.*text of this model is unknown; give --text"):
        open_held_out(run)
    with pytest.raises(UserError, match="needs passages of the training text"):
        make_anchor(model, params, [])
    (tmp_path / "own" / "vocab.json").write_text(json.dumps(["a", "b"]))
    with pytest.raises(UserError, match=r"predicts 32 characters, and its vocab.json has 2"):
        load_model(tmp_path / "own" / "shakespeare.safetensors")


REFUSED = {
    "lstm.weight_hh_l0_reverse": "other tensors: embed.weight, lstm.weight_hh_l0_reverse",
    "norm.bias": "2 further biases",
    "other.weight_ih_l0": "2 modules nn.LSTM",
    "lstm.weight_ih_l1": "lstm.weight_hh_l1 is missing",
    "lstm.weight_hr_l0": "other tensors: .*lstm.weight_hr_l0",
}


def test_other_state_dicts_are_refused(book_path, tmp_path):
    trained = plain_trained(book_path, tmp_path / "run", **KINDS["embed"])
    export(trained, epath.Path(tmp_path / "torch"))
    path = tmp_path / "torch" / "model.safetensors"
    tensors = load_file(path)
    for name, reason in REFUSED.items():
        save_file(tensors | {name: np.zeros((4, 4), np.float32)}, path)
        with pytest.raises(UserError, match=f"one nn.Linear .*: .*{reason}"):
            load_model(tmp_path / "torch")
    for name in tensors:
        save_file({key: x for key, x in tensors.items() if key != name}, path)
        with pytest.raises(UserError):
            load_model(tmp_path / "torch")
        for shape in ((), (3,), (0, 4), (2, 3, 4)):
            save_file(tensors | {name: np.zeros(shape, np.float32)}, path)
            with pytest.raises(UserError, match=str(path.parent)):
                load_model(tmp_path / "torch")


def test_scaled_inputs_are_a_table_of_one_column(book_path, tmp_path):
    trained = plain_trained(book_path, tmp_path / "run", **{"model.input": "scaled"})
    plain = to_plain(trained.run, trained.params)
    size = len(trained.run.vocab)
    np.testing.assert_allclose(plain.embedding_VE, [[i / size] for i in range(size)], rtol=1e-7)
    settings, params = from_plain(plain)
    assert (settings["input"], settings["embed_size"]) == ("embed", 1)
    assert_equal(params.pop("embed")["embedding"], plain.embedding_VE)
    assert_equal(params, jax.device_get(trained.params))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.multiplicative", True),
        ("model.recurrent_rms_norm", True),
        ("model.tie_embeddings", True),
        ("data.document_separator", "\n"),
    ],
)
def test_model_that_is_not_plain_names_the_setting(key, value, book_path, tmp_path):
    more = {"model.input": "embed"} if key == "model.tie_embeddings" else {}
    run = plain_trained(book_path, tmp_path / "run", **more, **{key: value}).run
    shown = repr(value) if key.startswith("data.") else value
    with pytest.raises(UserError, match=re.escape(f"config.{key}={shown}")):
        check_plain(run)
