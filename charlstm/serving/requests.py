"""Requests in JSON: their fields, their limits, and what is wrong with one."""

import json
import secrets
from typing import Any, NamedTuple

import numpy as np

from charlstm.config_check import check_setting
from charlstm.data.cleaning import CleaningStats
from charlstm.data.vocab import END
from charlstm.errors import UserError, one_line
from charlstm.filters import Settings
from charlstm.runs.folder import Run


class Limits(NamedTuple):
    """Limits of a server. Those of requests are in the answer of GET /api/model."""

    prompt_characters: int = 20_000  # of the text of a request
    length: int = 100_000  # characters that one request writes
    body_bytes: int = 2**18  # more than prompt_characters escaped in JSON
    requests_per_second: float = 50.0  # of one address
    burst: int = 100  # requests of one address at once
    waiting: int = 64  # requests that wait for a row of the batch, or to be read
    connections: int = 150
    seconds: float = 60.0  # for a client to send a request, or to take what was written


class RequestError(Exception):
    """A request that gets an answer with an error status and one line of JSON."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def error_body(message: str) -> bytes:
    """Return one line of JSON, the body of an answer with an error status."""
    return json.dumps({"error": message}).encode() + b"\n"


class WriteRequest(NamedTuple):
    """A request to continue a text."""

    ids_P: np.ndarray  # the text to continue, at least one character
    length: int
    settings: Settings
    seed: int
    top: int  # how many of the most probable next characters to return


class ReadRequest(NamedTuple):
    """A request for the surprise of each character of a text."""

    text: str  # as the model reads it
    ids_M: np.ndarray


MAX_TOP = 10
MAX_NUMBER = 1_000_000
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
# The fields of a request by path: their types and, for those of no setting, their range.
_WHOLE, _NUMBER = (int,), (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "unknown": (str,),
    "length": _WHOLE,
    "seed": _WHOLE,
    "top": _WHOLE,
    "temperature": _NUMBER,
    "top_k": _WHOLE,
    "top_p": _NUMBER,
    "min_p": _NUMBER,
}
_NAMES = {(str,): "a string", _WHOLE: "a whole number", _NUMBER: "a number"}
FIELDS = {"write": tuple(_TYPES), "read": ("text", "unknown")}


def parse_write(body: bytes, run: Run, limits: Limits) -> WriteRequest:
    """Return the request that `body` describes; settings default to the run's config.sample.

    Raises:
      RequestError: if it is not valid, with the field, its value and what is allowed.
    """
    fields = _parse_fields(body, "write")
    length = fields.get("length", min(run.config.sample.length, limits.length))
    seed = fields.get("seed")
    top = fields.get("top", 0)
    _check_range("length", length, 1, limits.length)
    _check_range("seed", seed or 0, 0, 2**32 - 1)
    _check_range("top", top, 0, MAX_TOP)
    settings = {name: fields.get(name, run.config.sample[name]) for name in _SAMPLING}
    for name, value in settings.items():
        try:
            check_setting(f"sample.{name}", value)
        except UserError as error:
            raise RequestError(400, str(error).removeprefix("config.sample.")) from None
    text, ids_P = _read_text(fields, run, limits)
    if not text and run.config.data.document_separator:
        ids_P = run.vocab.encode(END)
    if len(ids_P) == 0:
        raise RequestError(400, "text: has no character that the model knows; give some text")
    # Without a seed the text is another one each time; the answer has the seed.
    seed = secrets.randbelow(2**32) if seed is None else seed
    return WriteRequest(ids_P, length, Settings(**settings), seed, top)


def parse_read(body: bytes, run: Run, limits: Limits) -> ReadRequest:
    """Return the request that `body` describes; raise RequestError if it is not valid."""
    return ReadRequest(*_read_text(_parse_fields(body, "read"), run, limits))


def _parse_fields(body: bytes, kind: str) -> dict[str, Any]:
    try:
        fields = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body: not JSON ({one_line(error)})") from None
    if not isinstance(fields, dict):
        raise RequestError(400, "the body: must be a JSON object, such as {text: ...}")
    for name, value in fields.items():
        if name not in FIELDS[kind]:
            known = ", ".join(FIELDS[kind])
            raise RequestError(400, f"{_short(name)}: no such field; the fields are {known}")
        types = _TYPES[name]
        if type(value) not in types:
            raise RequestError(400, f"{name}={_short(value)}: must be {_NAMES[types]}")
        if types == _NUMBER and abs(value) > MAX_NUMBER:
            raise RequestError(400, f"{name}={_short(value)}: must be at most {MAX_NUMBER}")
    if "text" not in fields:
        raise RequestError(400, "text: missing; give the text that the model reads")
    return fields


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _read_text(fields: dict[str, Any], run: Run, limits: Limits) -> tuple[str, np.ndarray]:
    """Return the text of a request as the model reads it, cleaned as the run's text was."""
    text, unknown = fields["text"], fields.get("unknown", "error")
    if len(text) > limits.prompt_characters:
        raise RequestError(
            413, f"text: has {len(text):,} characters; at most {limits.prompt_characters:,}"
        )
    if unknown not in ("error", "drop", "replace"):
        raise RequestError(400, f"unknown={_short(unknown)}: must be error, drop or replace")
    stats = CleaningStats()
    cleaned = run.cleaning.apply_to(text, stats)
    if stats.num_cut:
        raise RequestError(400, "text: has Project Gutenberg's header or licence; leave them out")
    try:
        ids_M = run.vocab.encode(cleaned, unknown)
    except UserError as error:
        raise RequestError(400, f"text: {one_line(error)}") from None
    return run.vocab.decode(ids_M), ids_M


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise RequestError(400, f"{name}={_short(value)}: must be from {low} to {high}")


def _short(value: Any) -> str:
    shown = repr(value) if isinstance(value, int | float | str) else type(value).__name__
    return one_line(shown if len(shown) <= 40 else f"{shown[:40]}...")
