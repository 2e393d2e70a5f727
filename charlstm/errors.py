"""The two ways in which a command fails with one line instead of a traceback."""


class UserError(Exception):
    """A mistake of the user's: the message names the thing, its value and the remedy."""

    exit_code = 2


class RunError(UserError):
    """A run that cannot go on through nobody's typing mistake, such as a diverged loss."""

    exit_code = 1
