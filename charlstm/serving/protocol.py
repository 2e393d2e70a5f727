"""HTTP connections with limits: their number, and the seconds that a client may take."""

import asyncio
import socket
from http import HTTPStatus

from uvicorn.protocols.http.h11_impl import H11Protocol

from charlstm.serving.requests import Limits, error_body

SEND_BYTES = 2**16  # that the kernel holds for a client that does not read; megabytes by default


def error_response(status: int, message: str) -> bytes:
    """Return a whole HTTP response with an error, after which the connection closes."""
    body = error_body(message)
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + body


def make_protocol(limits: Limits) -> type[H11Protocol]:
    """Return the class of connections for uvicorn's setting `http`."""

    class Protocol(H11Protocol):
        """A connection that ends if its client is too slow, or if there are too many."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
            self._timer = self.loop.call_later(limits.seconds, self._end_idle)
            if len(self.connections) > limits.connections:
                transport.write(error_response(503, _too_many(limits)))
                transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def _end_idle(self) -> None:
            if self.cycle is None:  # no request yet
                self.transport.write(error_response(408, _too_slow(limits)))
                self.transport.close()

        def pause_writing(self) -> None:
            """Give the client time to read what was written."""
            super().pause_writing()
            self._timer.cancel()
            self._timer = self.loop.call_later(limits.seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._timer.cancel()
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:
            """Answer what is not HTTP."""
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(error_response(400, msg))
            self.transport.close()

    return Protocol


def _too_many(limits: Limits) -> str:
    return f"too many connections: at most {limits.connections}; try again later"


def _too_slow(limits: Limits) -> str:
    return f"no request within {limits.seconds:g} seconds"
