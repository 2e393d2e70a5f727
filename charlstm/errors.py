"""Errors that a command prints as one line instead of a traceback."""


class UserError(Exception):
    """A mistake of the user. The message has the argument or file, its value and the remedy."""

    exit_code = 2


class ArgumentError(UserError, ValueError):
    """An invalid argument of a public function, which may come from a command line."""


class DamagedError(UserError):
    """A missing or damaged file of a run folder."""


class OccupiedError(UserError):
    """A folder that belongs to another run."""


class RunError(UserError):
    """A failure that is not a mistake of the user, such as a full disk."""

    exit_code = 1


def printable(text: str) -> str:
    r"""Return `text` with control characters, except tab and newline, as escapes such as \x1b.

    Control characters could clear, rename or recolour the terminal.
    """
    return "".join(
        char if char in "\t\n" or not _is_control(ord(char)) else ascii(char)[1:-1] for char in text
    )


def one_line(message: object) -> str:
    """Return a text or the message of an exception as one printable line.

    The middle of a long message is omitted; an empty message becomes the name of its type.
    """
    line = printable(" ".join(str(message).split())) or type(message).__name__
    # A value can have thousands of digits; the argument and the remedy are at the ends.
    return line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}"


def _is_control(code: int) -> bool:
    # Lone surrogates too, which no encoding of a terminal has.
    return code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000
