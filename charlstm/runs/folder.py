"""The run folder: data to read and resume a run; none of its files is executed.

config.json    settings, text, source of the initial weights, versions, devices, and checksums
vocab.json     the characters in the order of their ids
prompts.json   windows of the training text, for samples without a prompt
metrics.jsonl, samples.txt, curves.png, TensorBoard events: see metrics.py
checkpoints/   the two latest states and the best one: see checkpoints.py
.lock          held by the process that trains
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from charlstm.config import base_config, flatten
from charlstm.config_check import validate
from charlstm.data.cleaning import Cleaning
from charlstm.data.vocab import END, Vocab
from charlstm.errors import DamagedError, OccupiedError, UserError, one_line
from charlstm.files import (
    EXPORTED_WEIGHTS,
    is_exported,
    is_link,
    is_lock,
    parse_json,
    read_small,
    refuse_links,
    temporary_name,
    write_file,
)

# Incremented whenever an older reader could misunderstand a newer folder.
SCHEMA = 1
NUM_PROMPTS = 256
PRNG_IMPLS = "threefry2x32", "rbg", "unsafe_rbg"
# Settings that may change when a run is resumed, besides sample.*. The hash of the text may not.
FREE_KEYS = {
    "num_epochs",
    "num_steps",
    "eval_every_steps",
    "patience",
    "checkpoint_every_steps",
    "log_every_steps",
    "data.path",
    "model.recurrence",
    "mesh.data",
}


class TextInfo(NamedTuple):
    """The text of a run; the names are those of config.json."""

    source: str  # an absolute path, or the name of Python's manual
    sha256: str
    bytes: int
    characters_cut: int  # headers and licences of Project Gutenberg
    characters: int
    training_characters: int
    validation_characters: int
    vocabulary: int


class InitialWeights(NamedTuple):
    """The weights that a run with config.init_from starts from; the names are in config.json."""

    path: str  # absolute, of a run folder or a file
    sha256: str


class Run(NamedTuple):
    """The content of a run folder, without checkpoints and metrics."""

    workdir: epath.Path
    config: ConfigDict
    vocab: Vocab
    text: TextInfo
    prompts: list[str]
    machine: dict[str, Any]  # versions and devices at the first start
    prng_impl: str  # JAX's name for the implementation of its random keys
    initial_weights: InitialWeights | None = None  # None: random ones

    def key(self, seed: int) -> jax.Array:
        """Return a random key of the implementation that the run began with."""
        return jax.random.key(seed, impl=self.prng_impl)

    @property
    def cleaning(self) -> Cleaning:
        """The cleaning of the run's text and of all text that its model reads."""
        return Cleaning.from_config(self.config.data)

    def decode(self, ids: Any) -> str:
        """Return the text of `ids`, with the run's separator for the end of a document."""
        separator, text = self.cleaning.separator, self.vocab.decode(ids)
        return text.replace(END, separator) if separator else text


def write_run(run: Run) -> None:
    """Write the files of `run` that are missing or have changed; config.json comes last.

    Raises:
      UserError: if the folder cannot be written, or holds another run or foreign files.
    """
    files = texts_of(run)
    try:
        _check_owner(run, files)
        for name, content in files.items():
            path = run.workdir / name
            if not path.exists() or path.read_bytes() != content.encode():
                write_file(path, content)
    except OSError as error:
        raise UserError(
            f"{run.workdir}: cannot write there ({error.strerror or error}); "
            "choose another --workdir"
        ) from None


def texts_of(run: Run, **more: Any) -> dict[str, str]:
    """Return the content of vocab.json, prompts.json and config.json by name.

    Args:
      run: the run.
      more: further entries of config.json.
    """
    files = {
        "vocab.json": run.vocab.to_json() + "\n",
        "prompts.json": json.dumps(run.prompts) + "\n",
    }
    about = {
        "schema": SCHEMA,
        **more,
        "config": run.config.to_dict(),
        "text": run.text._asdict(),
        **run.machine,
        "prng_impl": run.prng_impl,
        "initial_weights": run.initial_weights and run.initial_weights._asdict(),
        "sha256": {name: _sha256(content) for name, content in files.items()},
    }
    about["checksum"] = _checksum(about)
    return files | {"config.json": json.dumps(about, indent=2) + "\n"}


def _check_owner(run: Run, files: dict[str, str]) -> None:
    """Raise UserError if writing `run` would replace files of another run or program."""
    if has_run(run.workdir):
        # Another process may have created it since `run` was prepared.
        adapt_run(load_run(run.workdir), run.config)
        return
    check_free(run.workdir)
    for name, content in files.items():
        path = run.workdir / name
        if path.exists() and path.read_bytes() != content.encode():
            raise _occupied(run.workdir, [name])


def has_run(workdir: epath.Path) -> bool:
    """Return whether there is a run in `workdir`."""
    return (workdir / "config.json").exists()


def check_free(workdir: epath.Path) -> None:
    """Raise OccupiedError if a new run in `workdir` could replace foreign files.

    Allowed are the files of a start that was killed before it wrote config.json, and an empty
    folder `checkpoints`, which may be a link to another disk.
    """
    if not workdir.exists():
        return
    if is_exported(workdir):
        raise _exported(workdir)
    if workdir.is_file():
        raise UserError(f"{workdir}: a file, and a run is a folder; choose another --workdir")
    try:
        entries = list(workdir.iterdir())
    except OSError as error:
        raise UserError(
            f"{workdir}: cannot be read ({error.strerror or error}); choose another --workdir"
        ) from None
    if names := sorted(path.name for path in entries if not _may_stay(path)):
        raise _occupied(workdir, names)


def _may_stay(path: epath.Path) -> bool:
    if path.name == "checkpoints":
        return path.is_dir() and not any(path.iterdir())
    if path.name == ".lock":
        return is_lock(path)
    written = "vocab.json", "prompts.json"
    names = {*written, *(temporary_name(name) for name in (*written, "config.json"))}
    return path.name in names and path.is_file() and not is_link(path)


def _occupied(workdir: epath.Path, names: list[str]) -> OccupiedError:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return OccupiedError(
        f"{workdir}: is not empty and not a run (it holds {shown}); choose another --workdir"
    )


def load_run(workdir: epath.Path) -> Run:
    """Read a run folder.

    Raises:
      UserError: if there is no run, if another version wrote it, or if a link leads out of it.
      DamagedError: if a file has changed since it was written.
    """
    if not has_run(workdir):
        if workdir.is_file():
            raise _unknown_format(workdir)
        raise UserError(f"{workdir}: no run there (no config.json); train one with launch/train.py")
    refuse_links(workdir)
    run, about = parse_run(workdir, lambda name: read_small(workdir / name))
    if "model_type" in about:
        if not is_exported(workdir):
            raise _unknown_format(workdir)
        raise _exported(workdir)
    return run


def _unknown_format(path: epath.Path) -> UserError:
    return UserError(
        f"{path}: in a format that charlstm does not read, or without its weights (it reads "
        f"{' and '.join(EXPORTED_WEIGHTS)}); give the run folder, or an export of it as safetensors"
    )


def _exported(path: epath.Path) -> UserError:
    return UserError(
        f"{path}: an exported model, not a run with checkpoints and a log; to train it further, "
        f"give a new --workdir and --config.init_from={path}"
    )


def parse_run(workdir: epath.Path, read: Callable[[str], bytes]) -> tuple[Run, dict[str, Any]]:
    """Return a run and the entries of its config.json.

    Args:
      workdir: the run folder, or the exported model.
      read: returns the content of config.json, vocab.json or prompts.json.

    Raises:
      UserError: if another version wrote it.
      DamagedError: if a file has changed since it was written.
    """
    path = workdir / "config.json"
    about = parse_json(read("config.json"), path)
    schema = about.get("schema") if isinstance(about, dict) else None
    if not isinstance(schema, int) or schema < 1:
        raise DamagedError(
            f"{path}: not the config.json of a run; restore the file, or choose another --workdir"
        )
    if schema != SCHEMA:
        raise UserError(
            f"{workdir}: written by another version of charlstm (schema {schema} there and "
            f"{SCHEMA} here); use that version, or choose another --workdir"
        )
    if about.pop("checksum", None) != _checksum(about):
        raise DamagedError(
            f"{path}: its checksum differs; restore the file, and change settings by flags only"
        )
    config = base_config().lock()
    try:
        config.update(ConfigDict(about["config"]))
        validate(config)
        kinds = TextInfo.__annotations__.items()
        text = TextInfo(*(kind(about["text"][name]) for name, kind in kinds))
        machine = {"versions": dict(about["versions"]), "devices": list(about["devices"])}
        hashes = dict(about["sha256"])
        initial_weights = None
        if config.init_from:
            names = InitialWeights._fields
            initial_weights = InitialWeights(*(str(about["initial_weights"][n]) for n in names))
        prng_impl = about["prng_impl"]
        if prng_impl not in PRNG_IMPLS:
            raise ValueError(f"prng_impl is {prng_impl!r}")
    except (
        *(ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
        *(RecursionError, UserError),
    ) as error:
        raise DamagedError(f"{path}: not a config of this version ({one_line(error)})") from error
    vocab = _read_vocab(workdir / "vocab.json", read("vocab.json"), hashes)
    prompts = _read_strings(workdir / "prompts.json", read("prompts.json"), hashes)
    known = set(vocab.characters)
    # An exported model from another program has none.
    has_prompts = bool(prompts) or "model_type" in about
    if not has_prompts or not all(prompt and known.issuperset(prompt) for prompt in prompts):
        raise DamagedError(
            f"{workdir}/prompts.json: not prompts of this vocabulary; restore the file"
        )
    run = Run(workdir, config, vocab, text, prompts, machine, prng_impl, initial_weights)
    return run, about


def adapt_run(run: Run, config: ConfigDict) -> tuple[Run, list[str]]:
    """Return `run` with `config`, and a line for each setting that has changed.

    Raises:
      OccupiedError: if a setting has changed that must not.
    """
    there, here = flatten(run.config), flatten(config)
    changes = {
        key: f"{key} is {there[key]!r} there and {here[key]!r} here"
        for key in here
        if here[key] != there[key]
    }
    fixed = [
        line
        for key, line in changes.items()
        if key not in FREE_KEYS and not key.startswith("sample.")
    ]
    if fixed:
        raise OccupiedError(
            f"{run.workdir}: holds a run of another config ({'; '.join(fixed)}); "
            "repeat its settings, or choose another --workdir"
        )
    return run._replace(config=config), list(changes.values())


def random_prompts(ids_M: np.ndarray, vocab: Vocab, length: int, seed: int) -> list[str]:
    """Return NUM_PROMPTS random windows of `length` characters of a text."""
    starts = np.random.default_rng((seed, NUM_PROMPTS)).integers(
        0, len(ids_M) - length + 1, size=NUM_PROMPTS
    )
    return [vocab.decode(ids_M[start : start + length]) for start in starts]


def _read_vocab(path: epath.Path, raw: bytes, hashes: dict[str, str]) -> Vocab:
    try:
        vocab = Vocab(_read_strings(path, raw, hashes))
        "".join(vocab.characters).encode()  # lone surrogates are in no UTF-8 text
    except (TypeError, ValueError) as error:
        raise DamagedError(
            f"{path}: not a vocabulary ({one_line(error)}); restore the file"
        ) from error
    return vocab


def _read_strings(path: epath.Path, raw: bytes, hashes: dict[str, str]) -> list[str]:
    strings = parse_json(raw, path)
    if hashes.get(path.name) != hashlib.sha256(raw).hexdigest():
        raise DamagedError(f"{path}: its checksum differs; restore the file")
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise DamagedError(f"{path}: not a list of strings; restore the file")
    return strings


def _sha256(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _checksum(about: dict[str, Any]) -> str:
    return _sha256(json.dumps(about, sort_keys=True))
