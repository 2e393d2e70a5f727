"""The ways in which a command fails with one line instead of a traceback."""


class UserError(Exception):
    """A mistake of the user's: the message names the thing, its value and the remedy."""

    exit_code = 2


class ArgumentError(UserError, ValueError):
    """A wrong argument of a public function, which may also come from a command line."""


class DamagedError(UserError):
    """A file of a run folder that is not as it was written."""


class OccupiedError(UserError):
    """A run folder that belongs to something else, so that another one is needed."""


class RunError(UserError):
    """A failure that is not the user's mistake, such as a full disk."""

    exit_code = 1


def printable(text: str) -> str:
    r"""Return `text` with all control characters but tab and newline as escapes such as \x1b.

    A terminal obeys control characters: they clear it, rename it or recolour it.
    """
    return "".join(
        char if char in "\t\n" or not _is_control(ord(char)) else ascii(char)[1:-1] for char in text
    )


def one_line(message: object) -> str:
    """Return what a text or an exception says, fit for one line of a terminal.

    A long one is without its middle, an empty one is the name of its type.
    """
    line = printable(" ".join(str(message).split())) or type(message).__name__
    # A value may have thousands of digits; thing and remedy are at the ends.
    return line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}"


def _is_control(code: int) -> bool:
    # Lone surrogates too: no terminal's encoding has them.
    return code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000
