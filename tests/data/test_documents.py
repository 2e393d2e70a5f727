"""A run on documents, from training to generated text."""

import json

import pytest
from helpers import small_config

from charlstm.data.vocab import END
from charlstm.evaluation.measure import open_held_out
from charlstm.evaluation.writing import generate, show_each
from charlstm.runs.checkpoints import load_model
from charlstm.training.loop import train

STORY = "Once upon a time.\n"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Return the folder of a run that has memorized a story, the only one of its three files."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "stories").mkdir()
    for name in "abc":
        (folder / "stories" / f"{name}.txt").write_text("<|end|>".join([STORY] * 100))
    changes = {
        "data.document_separator": "<|end|>",
        "num_steps": 100,
        "batch_size": 8,
        "seq_len": 32,
        "eval_every_steps": 100,
        "log_every_steps": 50,
        "model.hidden_size": 32,
        "model.multiplicative": False,
        "model.recurrent_rms_norm": False,
        "model.dropout_rate": 0.0,
        "optimizer.name": "adam",
        "optimizer.learning_rate": 0.02,
        "optimizer.weight_decay": 0.0,
        "optimizer.average_window": 0.0,
    }
    assert train(small_config(folder / "stories", **changes), folder / "run")
    return folder / "run"


@pytest.fixture
def write(workdir):
    """Return write(prompt, ...) -> texts that continue it, with END as the separator."""
    run, model, params = load_model(workdir)

    def write(prompt="", num_samples=1, stop_at_end=True):
        options = {"chunk": 50, "stop_at_end": stop_at_end, "length": 100, "temperature": 0.0}
        writing = generate(run, model, params, prompt, num_samples=num_samples, **options)
        shown = []
        show_each(writing, run, shown.append)
        return [text.removeprefix("\n\f\n") for text in shown]

    return write


def test_run_on_documents_writes_one_and_stops(workdir, write):
    assert json.loads((workdir / "vocab.json").read_text()) == sorted({*STORY, END})
    samples = (workdir / "samples.txt").read_text()
    assert "<|end|>" in samples
    assert END not in samples
    assert write() == [STORY]
    assert write("Once up", num_samples=2) == [STORY, STORY]
    # A prompt may contain documents.
    assert write(f"{STORY}<|end|>Once") == [f"{STORY}<|end|>{STORY}"]
    [endless] = write(stop_at_end=False)
    assert endless.startswith(f"{STORY}<|end|>{STORY}")
    assert END not in endless


def test_held_out_documents_include_their_end(workdir, tmp_path):
    run, _, _ = load_model(workdir)
    (tmp_path / "new.txt").write_text(STORY)
    assert run.vocab.decode(open_held_out(run, str(tmp_path / "new.txt")).ids_M) == STORY + END
    own = open_held_out(run)
    assert len(own.ids_M) == round(0.1 * 300 * len(STORY + END))
    assert own.name.endswith("/stories")


def test_generate_reports_a_frame_cut_from_the_prompt(workdir, caplog):
    run, model, params = load_model(workdir)
    frame = "*** START OF THE PROJECT GUTENBERG EBOOK ***\n"
    generate(run, model, params, f"{frame}Once up", unknown="drop")
    assert f"{len(frame.strip())} characters" in caplog.text
