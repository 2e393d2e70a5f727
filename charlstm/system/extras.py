"""Import packages that only one command needs."""

from importlib import import_module
from types import ModuleType

from charlstm.errors import UserError


def import_extra(package: str, extra: str, purpose: str) -> ModuleType:
    """Return the package, which `pip install -e '.[EXTRA]'` installs.

    Raises:
      UserError: naming the package, its purpose and the extra, if it is not installed.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise UserError(
            f"{purpose} needs the package {package}; pip install -e '.[{extra}]'"
        ) from None
