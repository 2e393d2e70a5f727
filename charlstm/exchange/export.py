"""Export a trained model in one of the formats."""

from importlib import import_module
from typing import Any

from etils import epath

from charlstm.cli.folders import make_out
from charlstm.exchange import safetensors
from charlstm.exchange.card import metrics_of
from charlstm.exchange.folder import Trained
from charlstm.exchange.formats import FORMATS, PLAIN
from charlstm.exchange.plain import check_plain
from charlstm.exchange.reading import read_exported
from charlstm.files import is_exported
from charlstm.runs.checkpoints import load_model
from charlstm.runs.metrics import read_records
from charlstm.system.paths import model_path


def export(
    workdir: epath.PathLike,
    form: str,
    out: epath.PathLike = "",
    which: str = "best",
    **options: Any,
) -> epath.Path:
    """Write the model of a run in a format, and return the path.

    Args:
      workdir: the run folder, an exported model, or 'builtin'.
      form: a name in FORMATS.
      out: the folder to write, for safetensors also a file NAME.safetensors, for html a file; if
        empty, WORKDIR-FORMAT, or WORKDIR.html. An earlier export is replaced.
      which: the 'best' or the 'latest' checkpoint.
      options: arguments of the format's own export.

    Raises:
      UserError: if the model cannot be read, the format cannot express it, or `out` has other
        files or cannot be written.
    """
    trained = load_trained(workdir, which)
    if form in PLAIN:
        check_plain(trained.run)
    ending = ".html" if form == "html" else f"-{form}"
    path = epath.Path(out or str(workdir).rstrip("/") + ending)
    is_file = form == "html" or (form == "safetensors" and path.suffix == safetensors.SUFFIX)
    if not is_file:
        make_out(str(path), "config.json", {"model_type"})
    import_module(FORMATS[form]).export(trained, path, **options)
    return path


def load_trained(workdir: epath.PathLike, which: str = "best") -> Trained:
    """Return the model of a run or an export, with its metrics; `workdir` is as for load_model."""
    path = model_path(workdir)
    if is_exported(path) and which == "best":
        return read_exported(path)
    run, model, params = load_model(workdir, which)
    return Trained(run, model, params, metrics_of(read_records(path / "metrics.jsonl"), which))
