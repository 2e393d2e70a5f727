"""Exported models in the format safetensors, as a folder or as one file.

The folder is laid out as on the hub of Hugging Face. One file NAME.safetensors has the text files
of the folder in its metadata: the entry `charlstm` is a JSON object with the content of each file
by name. Neither is executed when it is loaded.
"""

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from charlstm.errors import DamagedError, RunError, UserError, one_line
from charlstm.exchange.folder import Trained, describe, write_folder
from charlstm.exchange.weights import damaged, flatten, unflatten
from charlstm.files import is_file, is_local, parse_json, unreadable, write_file
from charlstm.model import CharLSTM, model_of_run
from charlstm.runs.checksums import checksums
from charlstm.runs.folder import Run, parse_run

SUFFIX = ".safetensors"
WEIGHTS = "model.safetensors"
READ = ("F32", "F16")  # types of weights, by the format's names; all are computed with in float32
# A single entry, since the library writes several in random order.
ENTRY = "charlstm"
# The limit of the format for its header, which holds the metadata.
MAX_HEADER_BYTES = 100_000_000

_FILES = "- `model.safetensors`: the weights, in {weights}."
_LOADING = """
With charlstm, whose launchers take this export in place of a run folder:

```sh
python launch/sample.py --workdir=OUT --prompt='The '
```

In Python:

```python
from charlstm.runs.checkpoints import load_model

run, model, params = load_model("OUT")
```
"""


def export(trained: Trained, out: epath.Path, weights: str = "float32") -> None:
    """Write `trained` to the folder `out`, or to the file `out` if it ends in .safetensors.

    Args:
      trained: what is exported, any model.
      out: the folder or the file.
      weights: the type of the stored weights, 'float32' or 'float16'; they are read as float32.

    Raises:
      UserError: if `out` cannot be written, if it is a file of something else, or if a weight is
        too large for float16.
    """
    if weights == "float16":
        trained = _in_float16(trained)
    tensors = flatten(trained.params)
    texts = describe(trained, out, _FILES.format(weights=weights), _LOADING)
    if out.suffix != SUFFIX:
        write_folder(texts, {WEIGHTS: save(tensors)}, out)
        return
    entry = json.dumps(texts)
    if len(entry) > MAX_HEADER_BYTES // 2:  # the header has escapes in addition
        raise UserError(f"{out}: the prompts are too long for one file; give a folder in --out")
    _check_replaceable(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, save(tensors, {ENTRY: entry}))
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}); choose another --out"
        ) from None


def read_tensors(path: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the arrays of a safetensors file in float32, and the text files in its metadata.

    Raises:
      DamagedError: if it is no such file.
      RunError: if it cannot be read.
    """
    with ExitStack() as stack:
        file = _open(path, stack)
        types = {name: file.get_slice(name).get_dtype() for name in file.keys()}
        if others := [f"{name} is {kind}" for name, kind in types.items() if kind not in READ]:
            raise damaged(path, f"the weights must be {' or '.join(READ)}, and {others[0]}")
        try:
            tensors = {name: file.get_tensor(name).astype(np.float32) for name in types}
            entry = (file.metadata() or {}).get(ENTRY, "{}")
        except (OSError, SafetensorError) as error:
            raise damaged(path, one_line(error)) from error
    texts = parse_json(entry.encode(), path)
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise damaged(path, f"the entry {ENTRY} of its metadata")
    return tensors, texts


def read_params(
    path: epath.Path, tensors: dict[str, np.ndarray], run: Run, about: dict[str, Any]
) -> tuple[CharLSTM, Any]:
    """Return the model of `run` and its parameters from `tensors`.

    Raises:
      UserError: if they are those of another model.
      DamagedError: if they have changed since they were exported.
    """
    model = model_of_run(run.config, run.vocab)
    params = unflatten(path, model, tensors)
    if about.get("params_crc32") != checksums(tensors):
        raise damaged(path, "the checksum of a weight differs")
    return model, params


def reader_of(path: epath.Path, texts: dict[str, str]) -> Callable[[str], bytes]:
    """Return a function that returns the content of a text file, for parse_run."""

    def read(name: str) -> bytes:
        if name not in texts:
            raise damaged(path, f"no {name} in its metadata")
        return texts[name].encode("utf-8", "surrogatepass")  # parse_run refuses what is not UTF-8

    return read


def _open(path: epath.Path, stack: ExitStack) -> Any:
    try:
        if not is_file(path):
            raise damaged(path, "no such file")
        local = os.fspath(path)
        if not is_local(path):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            local = os.path.join(folder, WEIGHTS)
            epath.Path(local).write_bytes(path.read_bytes())
        # Read, not mapped: another program may cut the file.
        return stack.enter_context(safe_open(local, framework="numpy", backend="pread"))
    except OSError as error:
        raise unreadable(path, error) from error
    except SafetensorError as error:
        raise damaged(path, one_line(error)) from error


def _in_float16(trained: Trained) -> Trained:
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(trained.params))
    if largest > float(np.finfo(np.float16).max):
        raise UserError(f"a weight is {largest:.3g}, too large for float16; store float32")
    return trained._replace(params=jax.tree.map(np.float16, trained.params))


def _check_replaceable(out: epath.Path) -> None:
    """Raise UserError if `out` exists and is not an exported model."""
    if not out.exists():
        return
    try:
        _, texts = read_tensors(out)
        _, about = parse_run(out, reader_of(out, texts))
        is_ours = "model_type" in about
    except (DamagedError, RunError):
        is_ours = False
    if not is_ours:
        raise UserError(f"{out}: exists and is not an exported model; choose another --out")
