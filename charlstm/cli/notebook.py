"""Run a launcher by %run in a notebook, whose process continues after it."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from absl import flags

from charlstm.cli import streams


@contextmanager
def restored() -> Iterator[None]:
    """In a notebook, restore streams, warnings and flags after the block."""
    if not streams.is_notebook():
        yield
        return
    before = sys.stdout, sys.stderr, sys.unraisablehook
    with warnings.catch_warnings():
        try:
            yield
        finally:
            sys.stdout, sys.stderr, sys.unraisablehook = before
            forget_flags()


def forget_flags() -> None:
    """Remove the flags of the launcher, so that it can define them again."""
    own = {flag.name for flag in flags.FLAGS.flags_by_module_dict().get(sys.argv[0], [])}
    for name in list(flags.FLAGS):
        if name in own or name.split(".")[0] == "config":
            delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
