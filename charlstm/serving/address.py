"""The address at which a server listens."""

import errno
import socket

from charlstm.errors import UserError


def bind(host: str, port: int) -> socket.socket:
    """Return a socket at a host and port, at which clients cannot connect before it listens.

    Raises:
      UserError: if it is not possible, for example because the port is in use.
    """
    place = f"--host={host} --port={port}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        server = socket.socket(family, kind)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host={host}: no such address ({error}); give another one") from None
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Without the option of above, a port at which another process listens is in use.
        server.bind(address)
    except OSError as error:
        server.close()
        remedy = "stop what uses it, or " if error.errno == errno.EADDRINUSE else ""
        raise UserError(f"{place}: {error.strerror}; {remedy}give another --port") from None
    return server


def url_of(server: socket.socket) -> str:
    """Return the address of the page."""
    host, port = server.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def is_local(server: socket.socket) -> bool:
    """Return whether only processes of this machine can connect."""
    host = server.getsockname()[0]
    return host.startswith("127.") or host == "::1"
