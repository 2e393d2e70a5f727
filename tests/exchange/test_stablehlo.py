"""Exported programs of jax.export, run in a process that cannot import charlstm."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath
from exchanging import plain_trained
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


def assert_card_runs(trained, folder):
    """Run the program of the model card without charlstm, and compare its results with ours."""
    program = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    program = f"import sys\nsys.modules['charlstm'] = None\n{program}{SAVE}"
    answer = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=folder.parent, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    found = dict(np.load(folder.parent / "results.npz"))
    assert answer.stdout.startswith(trained.run.vocab.decode(found["ids_BL"][0]))
    run, model, params = trained.run, trained.model, trained.params
    prompt_BP = run.vocab.encode(run.prompts[0])[None]
    about = {"method": run.config.sample.method, "seq_len": run.config.seq_len}
    sampler = jax.jit(make_sampler(model, 30, **about), static_argnames="temperature")
    ids_BL = sampler(params, prompt_BP, run.key(0), temperature=0.8)
    np.testing.assert_array_equal(found["ids_BL"], ids_BL)
    optimizer = make_optimizer(run.config, lambda count: 1e-3)
    weights_BT = np.ones((1, 29), np.float32)
    batch = Batch(ids_BL[:, :-1], ids_BL[:, 1:], weights_BT, np.zeros(1, bool))
    state = init_state(model, optimizer, run.key(0), 1, params=params)
    train_step = jax.jit(make_train_step(model, optimizer))
    for _ in range(5):
        state, metrics = train_step(state._replace(carry=zero_carry(model, 1)), batch)
    params = averaged_params(state.params, state.opt_state)
    _, totals = jax.jit(make_eval_step(model))(params, zero_carry(model, 1), batch)
    for name, wanted in (metrics | totals).items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, err_msg=name)
    assert_close(dict(np.load(folder.parent / "params.npz")), flatten(params))


def test_model_card_runs_without_charlstm(exported):
    assert_card_runs(*exported)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["default", "all parts"])
def test_model_card_runs_for_other_models(kind, book_path, tmp_path):
    assert_card_runs(*exported_as(kind, book_path, tmp_path))


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
