"""A small trained model for the tests of the server."""

from conftest import ROOT

from charlstm.runs.checkpoints import load_model

END_CHAR = "L"


def small_model():
    """Return a run whose model ends a document with a character that is very improbable."""
    run, model, params = load_model(ROOT / "tests" / "fixtures" / "run_schema_1")
    model = model.clone(end_id=run.vocab.characters.index(END_CHAR), recurrence="flax")
    params["dense"]["bias"] = params["dense"]["bias"].at[model.end_id].set(-40.0)
    return run, model, params
