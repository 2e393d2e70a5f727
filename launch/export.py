"""Export a trained run for other programs.

  python launch/export.py --workdir=runs/default-pg345 --format=safetensors [--out=PATH]

safetensors  a folder as on the hub of Hugging Face, with a model card; one file with
             --out=NAME.safetensors; for every model
keras        the same folder with model.keras; for a plain LSTM
torch        the same folder with a state_dict of nn.LSTM and nn.Linear; for a plain LSTM
stablehlo    the same folder, and programs of jax.export: training step, evaluation step, sampler;
             for every model
onnx         the same folder with model.onnx, a graph for onnxruntime; for every model
html         a page that writes, with the model inside; for every model

Every launcher takes an export, except a page and ONNX, as --workdir in place of a run folder: the
folder, its file of weights, or a file from Keras or torch beside a vocab.json, a JSON list of the
characters in the order of their ids. This launcher thus converts between the formats. A plain LSTM
has neither config.model.multiplicative nor recurrent_rms_norm.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
from absl import flags

from charlstm.cli import folders, options
from charlstm.errors import UserError
from charlstm.exchange.formats import FORMATS, WEIGHTS

WORKDIR = flags.DEFINE(
    options.ANY_PATH, "workdir", "", "the run folder; the last trained in runs/ if none"
)
CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "which weights")
FORMAT = flags.DEFINE_enum("format", "safetensors", list(FORMATS), "the format")
OUT = flags.DEFINE(
    options.ANY_PATH, "out", "", "what to write; WORKDIR-FORMAT, or WORKDIR.html, if none"
)
TYPE = flags.DEFINE_enum(
    "weights",
    None,
    sorted({kind for kinds in WEIGHTS.values() for kind in kinds}),
    "the type of stored weights, for safetensors (float32 if none) and html (int16 if none)",
)


def main() -> None:
    """Export as the flags say, and print the path."""
    kinds = WEIGHTS.get(FORMAT.value, ())
    if TYPE.value and TYPE.value not in kinds:
        known = f"has {', '.join(kinds)}" if kinds else "has no choice of types"
        raise UserError(f"--weights={TYPE.value}: --format={FORMAT.value} {known}")
    workdir = folders.trained_workdir(WORKDIR.value)
    from charlstm.exchange.export import export  # it imports JAX

    settings = {"weights": TYPE.value} if TYPE.value else {}
    print(export(workdir, FORMAT.value, OUT.value, CHECKPOINT.value, **settings))


if __name__ == "__main__":
    app.run(main, "--format=safetensors --out=book.safetensors")
