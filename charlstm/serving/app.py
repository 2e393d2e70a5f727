"""The ASGI application: the page, and an API in JSON and server-sent events."""

import asyncio
import base64
import hashlib
import json
import logging
import math
import re
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from charlstm.errors import one_line
from charlstm.exchange.html import TEMPLATE
from charlstm.exchange.html import describe as describe_run
from charlstm.pages.embed import fill_page
from charlstm.runs.folder import Run
from charlstm.serving.batcher import End, Piece, Surprise
from charlstm.serving.guard import Guard, error_answer
from charlstm.serving.requests import (
    Limits,
    ReadRequest,
    RequestError,
    WriteRequest,
    parse_read,
    parse_write,
)
from charlstm.serving.worker import Worker

logger = logging.getLogger("charlstm.serve")

DIGITS = 4  # of bits and probabilities after the point
EVENT_SECONDS = 0.04  # between the events of a text, since many small events take much time
MAX_DISCARDED = 2**26  # bytes of a body that is too large, read so that the client gets the answer


def make_app(run: Run, worker: Worker, host: str, limits: Limits) -> Any:
    """Return the application for a run whose model `worker` runs."""

    page = fill_page(TEMPLATE, describe_run(run) | {"engine": "server"})
    policy = content_policy(page)

    async def show_page(request: Request) -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": policy})

    async def about(request: Request) -> JSONResponse:
        return JSONResponse(describe(run, limits))

    async def write(request: Request) -> Any:
        wanted = parse_write(await read_body(request, limits), run, limits)
        return EventStream(run, worker, wanted)

    async def read(request: Request) -> Response:
        wanted = parse_read(await read_body(request, limits), run, limits)
        answer = Answer(worker, wanted)
        waiting = asyncio.ensure_future(answer.whole()), asyncio.ensure_future(request.receive())
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            answer.leave()
            for future in waiting:
                future.cancel()
        if waiting[0] not in done:
            return Response()  # the client has left
        found = waiting[0].result()[0]
        if not isinstance(found, Surprise):
            raise RequestError(503, "the server is stopping")
        surprise = rounded(found.bits_M)
        [top] = next_characters(run, found.top_ids_K[None], found.top_probs_K[None])
        return JSONResponse({"text": wanted.text, "surprise": surprise, "next": top})

    routes = [
        Route("/", show_page),
        Route("/api/model", about),
        Route("/api/write", write, methods=["POST"]),
        Route("/api/read", read, methods=["POST"]),
    ]
    handlers = {RequestError: _refuse, HTTPException: _refuse_http, Exception: _fail}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), host, limits)


def content_policy(page: str) -> str:
    """Return the Content-Security-Policy of a page: only its own scripts run."""
    scripts = re.findall("<script[^>]*>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def describe(run: Run, limits: Limits) -> dict[str, Any]:
    """Return the name of the model, its characters in the order of their ids, and the limits."""
    named = ("prompt_characters", "length", "body_bytes", "requests_per_second", "connections")
    return {
        "name": run.workdir.name,
        "characters": list(run.vocab.characters),
        "limits": {name: getattr(limits, name) for name in named},
    }


async def _refuse(request: Request, error: Any) -> Response:
    # Asking again at once would not help.
    headers = {"retry-after": "1"} if error.status == 503 else None
    return error_answer(error.status, str(error), headers)


async def _refuse_http(request: Request, error: Any) -> Response:
    message = f"{request.method} {request.url.path[:100]}: {error.detail}"
    return error_answer(error.status_code, message, error.headers)


async def _fail(request: Request, error: Exception) -> Response:
    logger.error("%s %s: %s", request.method, type(error).__name__, one_line(error))
    return error_answer(500, "the server failed")


async def read_body(request: Request, limits: Limits) -> bytes:
    """Return the body of a request.

    Raises:
      RequestError: if it is too large or comes too slowly.
    """
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                size += len(part)
                if size <= limits.body_bytes:
                    body += part
                if size > MAX_DISCARDED:
                    break
    except TimeoutError:
        raise RequestError(408, f"no body within {limits.seconds:g} seconds") from None
    if size > limits.body_bytes:
        raise RequestError(413, f"the body: more than {limits.body_bytes:,} bytes")
    return bytes(body)


class Answer:
    """What the worker computes for one request."""

    def __init__(self, worker: Worker, request: WriteRequest | ReadRequest):
        """Submit the request; raise RequestError if the worker takes no more."""
        self._ready, loop = asyncio.Event(), asyncio.get_running_loop()
        self._worker = worker
        self._task = worker.submit(request, lambda: loop.call_soon_threadsafe(self._ready.set))

    async def items(self) -> AsyncIterator[list[Any]]:
        """Yield all that is there, as soon as there is something, up to an End."""
        while True:
            await self._ready.wait()
            self._ready.clear()
            if items := self._worker.take(self._task):
                yield items
                if isinstance(items[-1], End):
                    return

    async def whole(self) -> list[Any]:
        """Return all items."""
        return [item async for items in self.items() for item in items]

    def leave(self) -> None:
        """Drop the rest."""
        self._worker.leave(self._task)


class EventStream:
    """The response to a WriteRequest: server-sent events, which end when the client leaves."""

    def __init__(self, run: Run, worker: Worker, request: WriteRequest):
        """Submit the request; raise RequestError if the worker takes no more."""
        self._run, self._request, self._answer = run, request, Answer(worker, request)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            response = StreamingResponse(self._events(), media_type="text/event-stream")
            await response(scope, receive, send)
        finally:
            self._answer.leave()

    async def _events(self) -> AsyncIterator[str]:
        count = 0
        async for items in self._answer.items():
            pieces = [item for item in items if isinstance(item, Piece)]
            if pieces:
                whole = Piece(*map(np.concatenate, zip(*pieces, strict=True)))
                count += len(whole.ids_T)
                yield f"data: {to_json(piece_data(self._run, whole, self._request.top))}\n\n"
            if isinstance(end := items[-1], End):
                about = {"reason": end.reason, "characters": count, "seed": self._request.seed}
                yield f"event: end\ndata: {to_json(about)}\n\n"
            else:
                await asyncio.sleep(EVENT_SECONDS)


def piece_data(run: Run, piece: Piece, top: int) -> dict[str, Any]:
    """Return the data of an event: characters, their bits, and what could follow each of them."""
    data: dict[str, Any] = {"text": run.decode(piece.ids_T), "bits": rounded(piece.bits_T)}
    if top:
        data["next"] = next_characters(run, piece.top_ids_TK[:, :top], piece.top_probs_TK[:, :top])
    return data


def next_characters(run: Run, ids_TK: np.ndarray, probs_TK: np.ndarray) -> list[list[Any]]:
    """Return [[character, probability], ...] of the most probable next characters for each T."""
    characters = run.vocab.characters
    names_TK = [[characters[index] for index in row] for row in ids_TK.tolist()]
    probs_TK = np.round(probs_TK.astype(np.float64), DIGITS)
    return [
        list(map(list, zip(names, probs, strict=True)))
        for names, probs in zip(names_TK, probs_TK.tolist(), strict=True)
    ]


def rounded(values_M: np.ndarray) -> list[float | None]:
    """Return numbers for JSON, which has no NaN."""
    found: list[float] = np.round(values_M.astype(np.float64), DIGITS).tolist()
    return [None if math.isnan(value) else value for value in found]


def to_json(data: Any) -> str:
    """Return `data` as one line of ASCII."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False)
