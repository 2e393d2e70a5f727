"""Write a page: a template of this folder with data in it."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from charlstm.errors import UserError
from charlstm.files import write_file

# A comment in a template, in whose place the file that it names is inserted.
_COMMON = r"/\* (common\.\w+) \*/\n"
# The element of a template that holds the data; a script reads it by JSON.parse.
_BEGIN, _END = '<script id="data" type="application/json">', "</script>"
# In the head of each template, so that a page replaces no other file.
_MARK = b'<meta name="generator" content="charlstm">'
_MARK_WITHIN = 1000  # bytes


def write_page(template_name: str, data: Any, out_path: epath.PathLike) -> None:
    """Write one self-contained page: a template with `data` as JSON in the element `data`.

    Args:
      template_name: a file of charlstm/pages/, with an empty script element `data`.
      data: dicts, lists, texts, numbers, and NumPy arrays of numbers. NaN becomes null.
      out_path: the file to write. An earlier page is replaced.

    Raises:
      ValueError: if a number is infinite.
      UserError: as check_out, and if the file cannot be written.
    """
    path = check_out(out_path)
    page = fill_page(template_name, data)
    try:
        write_file(path, page)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); choose another --out"
        ) from None


def fill_page(template_name: str, data: Any) -> str:
    """Return the page that write_page writes."""

    def read(name: str) -> str:
        return Path(__file__).with_name(name).read_text(encoding="utf-8")

    template = re.sub(_COMMON, lambda name: read(name[1]), read(template_name))
    before, begin, after = template.partition(_BEGIN + _END)
    if not begin:
        raise ValueError(f"{template_name}: has no empty script element 'data'")
    return f"{before}{_BEGIN}{to_json(data)}{_END}{after}"


def check_out(out_path: epath.PathLike) -> epath.Path:
    """Return `out_path`; raise UserError if it exists and is not a page."""
    path = epath.Path(out_path)
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give the name of a file in --out")
        if not path.exists():
            return path
        with path.open("rb") as file:
            head = file.read(_MARK_WITHIN)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); choose another --out"
        ) from None
    if _MARK not in head:
        raise UserError(f"{path}: exists and is not a page of charlstm; choose another --out")
    return path


def to_json(data: Any) -> str:
    """Return `data` as JSON that can stand within a script element.

    It is ASCII and has no `<`, thus no tag or comment; other characters are escapes.

    Raises:
      ValueError: if a number is infinite.
    """
    text = json.dumps(_plain(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    # These characters occur in strings only.
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _plain(value: Any) -> Any:
    """Return `value` with NumPy's types as Python's, and None in place of NaN."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
