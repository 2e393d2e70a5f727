"""Checks of each HTTP request before its body is read, and headers of each answer."""

import ipaddress
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from starlette.responses import Response

from charlstm.serving.requests import Limits, RequestError, error_body

MAX_ADDRESSES = 10_000  # whose rate is known
# Other sites cannot show the page in a frame or read an answer; there are no CORS headers.
HEADERS = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def error_answer(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response with one line of JSON."""
    return Response(error_body(message), status, headers, "application/json")


def is_own_host(header: str, names: set[str]) -> bool:
    """Return whether a Host header names this machine by an address or by one of `names`.

    Under DNS rebinding a web page reaches this server by a name of its own domain.
    """
    try:
        host = _without_port(header)
        ipaddress.ip_address(host)
    except ValueError:
        return host.lower().rstrip(".") in names
    return True


def _without_port(header: str) -> str:
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


class RateLimit:
    """Token buckets: one for each address."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic):
        """Use `clock` for the time in seconds."""
        self._limits, self._clock = limits, clock
        # The tokens and the time at which there were so many, the last used address last.
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, address: str) -> bool:
        """Take one token of an address; return whether there was one."""
        now = self._clock()
        tokens, then = self._buckets.pop(address, (float(self._limits.burst), now))
        grown = tokens + (now - then) * self._limits.requests_per_second
        tokens = min(float(self._limits.burst), grown)
        self._buckets[address] = (tokens - 1, now) if tokens >= 1 else (tokens, now)
        if len(self._buckets) > MAX_ADDRESSES:
            self._buckets.popitem(last=False)
        return tokens >= 1


class Guard:
    """ASGI middleware that refuses foreign hosts, other sites and too many requests."""

    def __init__(self, app: Any, host: str, limits: Limits):
        """Guard `app`, which is served at `host`."""
        self._app, self._rate, self._limits = app, RateLimit(limits), limits
        self._names = {"localhost", socket.gethostname().lower(), host.lower()}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Check a request and pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = message | {"headers": [*message["headers"], *more]}
            await send(message)

        try:
            self._check(scope)
        except RequestError as error:
            await error_answer(error.status, str(error))(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _check(self, scope: Any) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if not is_own_host(host, self._names):
            raise RequestError(403, f"host={host[:100]!r}: is no name of this machine")
        origin = headers.get(b"origin", f"http://{host}")
        if origin != f"http://{host}":
            raise RequestError(403, f"origin={origin[:100]!r}: another site; there is no CORS")
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise RequestError(415, f"content-type={kind[:100]!r}: must be application/json")
            if not self._rate.take((scope.get("client") or ("",))[0]):
                rate = self._limits.requests_per_second
                raise RequestError(429, f"too many requests: at most {rate:g} per second")
