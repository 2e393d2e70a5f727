"""Format tables as plain text."""

from rich.console import Console
from rich.table import Table

from charlstm.errors import printable

MAX_WIDTH = 2**16  # wide enough that no cell is cut or wrapped


def plain_text(table: Table) -> str:
    """Return `table` as lines without colors, as wide as its cells need."""
    console = Console(width=MAX_WIDTH, color_system=None, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    lines = printable(capture.get()).rstrip("\n").split("\n")
    return "\n".join(line.rstrip() for line in lines)
