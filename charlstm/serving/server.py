"""Serve an ASGI application at a socket until a signal."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from charlstm.errors import RunError, UserError
from charlstm.serving.address import url_of
from charlstm.serving.protocol import make_protocol
from charlstm.serving.requests import Limits
from charlstm.serving.worker import Worker

BACKLOG = 256  # connections that the kernel holds until they are accepted
STOP_SECONDS = 3  # for connections to end


class Server(uvicorn.Server):
    """A server that stops when a function says so, and leaves signals to the launcher."""

    def __init__(self, config: uvicorn.Config, worker: Worker, should_stop: Callable[[], bool]):
        super().__init__(config)
        self._worker, self._should_stop = worker, should_stop

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do not capture signals."""
        yield

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop; called every 0.1 seconds."""
        if self._should_stop() or self._worker.is_stopped:
            self._worker.stop()  # ends the answers, for whose end the server waits
            self.should_exit = True
        return await super().on_tick(counter)


def serve(
    app: Any,
    server_socket: socket.socket,
    worker: Worker,
    limits: Limits,
    should_stop: Callable[[], bool],
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until `should_stop` returns true.

    Args:
      app: the ASGI application.
      server_socket: as `bind` returns it.
      worker: computes the answers of `app`.
      limits: of connections.
      should_stop: is asked ten times per second.
      on_ready: is called when clients can connect.

    Raises:
      UserError: if another process listens at the address by now.
      RunError: if the worker failed.
    """
    config = uvicorn.Config(
        app,
        http=make_protocol(limits),
        loop="asyncio",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level="critical",  # the application logs its failures
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    try:
        server_socket.listen(BACKLOG)
    except OSError as error:
        raise UserError(f"{url_of(server_socket)}: {error.strerror}; give another --port") from None
    worker.start()
    on_ready()
    try:
        Server(config, worker, should_stop).run([server_socket])
    finally:
        worker.stop()
    if worker.failure:
        raise RunError(f"the model failed: {worker.failure}") from worker.failure
