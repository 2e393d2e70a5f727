"""Exported programs of jax.export, run in a process that cannot import charlstm."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath
from exchanging import plain_trained
from flax.traverse_util import unflatten_dict
from helpers import QUICK, assert_close, assert_equal

from charlstm.data.batches import Batch
from charlstm.exchange.stablehlo import PLATFORMS, export
from charlstm.exchange.weights import flatten
from charlstm.model import zero_carry
from charlstm.optim import averaged_params, make_optimizer
from charlstm.runs.checkpoints import load_model
from charlstm.sampling import make_sampler
from charlstm.steps import init_state, make_eval_step, make_train_step

pytest.importorskip("flatbuffers", reason="JAX needs it to serialize")
pytestmark = pytest.mark.usefixtures("cheaply")

PARTS = {"model.multiplicative": True, "model.recurrent_rms_norm": True}
WINDOWS = {
    "data.document_separator": "\n",
    "sample.method": "window",
    "optimizer.average_window": 0,
}
TIED = {"model.input": "embed", "model.tie_embeddings": True, "model.num_layers": 2}
KINDS = {"quick": QUICK, "default": PARTS, "all parts": PARTS | WINDOWS | TIED}
# Appended to the program of the model card.
SAVE = """
np.savez("results.npz", ids_BL=ids_BL, **metrics | totals)
np.savez("params.npz", **params)
"""


def exported_as(kind, book_path, home):
    """Return a model of random weights and the folder of its export."""
    trained = plain_trained(book_path, home / "run", **KINDS[kind])
    if kind == "all parts":
        trained = trained._replace(run=trained.run._replace(prng_impl="rbg"))
    export(trained, epath.Path(home / "book"))
    return trained, home / "book"


@pytest.fixture(scope="module")
def exported(book, tmp_path_factory):
    home = tmp_path_factory.mktemp("stablehlo")
    (home / "book.txt").write_text(book)
    return exported_as("quick", home / "book.txt", home)


def run_card(folder):
    """Run the program of the model card without charlstm; return its arrays and parameters."""
    program = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    program = f"import sys\nsys.modules['charlstm'] = None\n{program}{SAVE}"
    answer = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=folder.parent, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    found = dict(np.load(folder.parent / "results.npz"))
    vocab = json.loads((folder / "vocab.json").read_text())
    assert answer.stdout.startswith("".join(vocab[index] for index in found["ids_BL"][0]))
    return found, dict(np.load(folder.parent / "params.npz"))


def batch_of(ids_BL):
    weights_BT = np.ones((1, ids_BL.shape[1] - 1), np.float32)
    return Batch(ids_BL[:, :-1], ids_BL[:, 1:], weights_BT, np.zeros(1, bool))


def evaluate(model, params, batch):
    return jax.jit(make_eval_step(model))(params, zero_carry(model, 1), batch)[1]


def assert_sample_and_evaluation_are_ours(trained, found, params):
    run, model = trained.run, trained.model
    about = {"method": run.config.sample.method, "seq_len": run.config.seq_len}
    sampler = jax.jit(make_sampler(model, 30, **about), static_argnames="temperature")
    prompt_BP = run.vocab.encode(run.prompts[0])[None]
    ids_BL = sampler(trained.params, prompt_BP, run.key(0), temperature=0.8)
    np.testing.assert_array_equal(found["ids_BL"], ids_BL)
    tree = unflatten_dict(params, sep=".")
    for name, wanted in evaluate(model, tree, batch_of(found["ids_BL"])).items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, err_msg=name)


def test_model_card_runs_without_charlstm(exported):
    trained, folder = exported
    found, params = run_card(folder)
    assert_sample_and_evaluation_are_ours(trained, found, params)
    before = evaluate(trained.model, trained.params, batch_of(found["ids_BL"]))
    assert found["nats"] < found["loss"] * 29 < before["nats"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["default", "all parts"])
def test_training_of_the_model_card_is_ours(kind, book_path, tmp_path):
    trained, folder = exported_as(kind, book_path, tmp_path)
    found, params = run_card(folder)
    assert_sample_and_evaluation_are_ours(trained, found, params)
    run, model = trained.run, trained.model
    optimizer = make_optimizer(run.config, lambda count: 1e-3)
    state = init_state(model, optimizer, run.key(0), 1, params=trained.params)
    train_step = jax.jit(make_train_step(model, optimizer))
    for _ in range(5):
        start = state._replace(carry=zero_carry(model, 1))
        state, metrics = train_step(start, batch_of(found["ids_BL"]))
    for name, wanted in metrics.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, err_msg=name)
    assert_close(params, flatten(averaged_params(state.params, state.opt_state)))


def test_programs_are_for_all_platforms_and_sizes(exported):
    trained, folder = exported
    assert_equal(load_model(folder)[2], jax.device_get(trained.params))
    names = {path.stem for path in folder.glob("*.jax_export")}
    assert names == {"init_state", "train_step", "eval_step", "sample"}
    for name in names:
        raw = (folder / f"{name}.jax_export").read_bytes()
        program = jax.export.deserialize(bytearray(raw))
        assert program.platforms == PLATFORMS
        assert not program.disabled_safety_checks
        sizes = {str(size) for aval in program.in_avals for size in aval.shape}
        wanted = {"init_state": set(), "sample": {"B", "P"}}.get(name, {"B", "T"})
        assert {size for size in sizes if not size.isdecimal()} == wanted
