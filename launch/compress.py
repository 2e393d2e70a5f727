"""Compress a file with a trained run, which proves that its bits per character are a code length.

  python launch/compress.py FILE --workdir=runs/default-pg345 [--out=FILE.clstm]
  python launch/compress.py FILE.clstm --decompress --workdir=runs/default-pg345 [--out=FILE]

Any file comes back byte for byte. Its compressed size is the loss of the run on the text, in bits,
plus a header of about 60 bytes. The text is not cleaned. Characters that the run does not know, and
bytes that are not UTF-8, are listed apart and take a few bytes each. A text is read in parts of
about 16,000 characters, in parallel, each from an empty state, which costs about 15 bits per part.

Decompression computes the same probabilities again. It needs the same weights, the same versions of
jax and jaxlib, and the same kind of machine with as many cores. Elsewhere the result may differ; a
checksum detects that, and nothing is written. Therefore do not archive files in this format.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
from absl import flags
from etils import epath

from charlstm.cli import folders, options
from charlstm.errors import UserError
from charlstm.files import write_file
from charlstm.system.paths import local_path

ENDING = ".clstm"

WORKDIR = flags.DEFINE(
    options.ANY_PATH, "workdir", "", "the run folder; the last trained in runs/ if none"
)
CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "which weights")
DECOMPRESS = flags.DEFINE_boolean("decompress", False, "restore a compressed file")
OUT = flags.DEFINE(
    options.LOCAL_PATH, "out", "", f"the file to write; FILE with or without {ENDING} if none"
)
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "replace the file to write, if it exists")


def choose_out(path: str) -> str:
    """Return the file to write for the file at `path`; raise UserError if there is one already."""
    out = OUT.value
    if not out and DECOMPRESS.value and not path.endswith(ENDING):
        raise UserError(f"{path}: does not end in {ENDING}; give --out=FILE")
    if not out:
        out = path.removesuffix(ENDING) if DECOMPRESS.value else path + ENDING
    if os.path.lexists(out) and (os.path.isdir(out) or not OVERWRITE.value):
        raise UserError(f"{out}: exists already; give another --out, or --overwrite for a file")
    if not os.path.isdir(os.path.dirname(out) or "."):
        raise UserError(f"{out}: there is no such folder; make it, or give another --out")
    return out


def read_file(path: str) -> bytes:
    """Return the bytes of a file; raise UserError if it cannot be read."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path}: is no regular file; give a file")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def main(paths: list[str]) -> None:
    """Compress or decompress a file as the flags say."""
    if len(paths) != 1:
        raise UserError(f"{len(paths)} files: give one FILE to compress, see --help")
    path = local_path(paths[0])
    content, out = read_file(path), choose_out(path)
    workdir = folders.trained_workdir(WORKDIR.value)
    from charlstm.evaluation import coding, compression  # they import JAX
    from charlstm.runs.checkpoints import load_model
    from charlstm.system.console import reading_bar

    coding.import_coder()
    size = len(content)
    if DECOMPRESS.value:
        size = compression.read_header(content, path)[0].num_coded
    run, model, params = load_model(workdir, CHECKPOINT.value)
    if DECOMPRESS.value:
        with reading_bar("decoding", size) as advance:
            raw = compression.decompress(run, model, params, content, path, advance)
        report = f"{len(raw):,} bytes"
    else:
        with reading_bar("coding", size) as advance:
            result = compression.compress(run, model, params, content, advance)
        raw, report = result.raw, str(result)
    try:
        write_file(epath.Path(out), raw)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None
    print(f"{out}: {report}")


if __name__ == "__main__":
    app.run(main, "--workdir=runs/default-pg345 notes.txt", takes_files=True)
