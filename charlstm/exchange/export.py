"""Export a trained model in one of the formats."""

from importlib import import_module

from etils import epath

from charlstm.cli.folders import make_out
from charlstm.exchange import safetensors
from charlstm.exchange.card import metrics_of
from charlstm.exchange.folder import Trained
from charlstm.exchange.formats import FORMATS
from charlstm.exchange.plain import check_plain
from charlstm.exchange.reading import read_exported
from charlstm.files import is_exported
from charlstm.runs.checkpoints import load_model
from charlstm.runs.metrics import read_records


def export(
    workdir: epath.PathLike, form: str, out: epath.PathLike = "", which: str = "best"
) -> epath.Path:
    """Write the model of a run in a format, and return the path.

    Args:
      workdir: the run folder, or an exported model.
      form: a name in FORMATS.
      out: the folder to write, or for safetensors a file NAME.safetensors; WORKDIR-FORMAT if empty.
        An earlier export is replaced.
      which: the 'best' or the 'latest' checkpoint.

    Raises:
      UserError: if the model cannot be read, the format cannot express it, or `out` has other
        files or cannot be written.
    """
    trained = load_trained(epath.Path(workdir), which)
    if form != "safetensors":
        check_plain(trained.run)
    path = epath.Path(out or f"{str(workdir).rstrip('/')}-{form}")
    if form != "safetensors" or path.suffix != safetensors.SUFFIX:
        make_out(str(path), "config.json", {"model_type"})
    import_module(FORMATS[form]).export(trained, path)
    return path


def load_trained(workdir: epath.Path, which: str = "best") -> Trained:
    """Return the model of a run or an export, with its metrics."""
    if is_exported(workdir) and which == "best":
        return read_exported(workdir)
    run, model, params = load_model(workdir, which)
    return Trained(run, model, params, metrics_of(read_records(workdir / "metrics.jsonl"), which))
