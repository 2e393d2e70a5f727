"""Serve a page, and a small HTTP API, for people who write with a trained run.

  python launch/serve.py --workdir=runs/default-pg345 [--port=8000]

Open the printed address in a browser. Up to --readers texts are written at the same time in one
compiled call; more wait. The API is JSON over HTTP: GET /api/model, POST /api/read, POST /api/write
(server-sent events); charlstm/serving/README.md describes it. Ctrl-C stops the server.

There is no authentication and no encryption: with another --host than 127.0.0.1, everybody who
reaches this machine can use the model. It needs pip install -e '.[serve]'.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
import app  # first, since it handles signals

# isort: split
import logging

from absl import flags

from charlstm.cli import folders, options
from charlstm.serving import address
from charlstm.system.extras import import_extra

logger = logging.getLogger("charlstm.serve")

WORKDIR = flags.DEFINE(
    options.ANY_PATH, "workdir", "", "the run folder; the last trained in runs/ if none"
)
CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "which weights")
HOST = flags.DEFINE_string("host", "127.0.0.1", "the address to listen at")
PORT = flags.DEFINE_integer("port", 8000, "the port; 0: a free one", 0, 2**16 - 1)
READERS = flags.DEFINE_integer("readers", 32, "texts written at the same time", 1, 1024)


def main() -> int:
    """Serve until a signal; return the exit code."""
    for package in ("starlette", "uvicorn"):
        import_extra(package, "serve", "launch/serve.py")
    socket = address.bind(HOST.value, PORT.value)
    workdir = folders.trained_workdir(WORKDIR.value)
    from charlstm.runs.checkpoints import load_model  # it imports JAX
    from charlstm.serving import server
    from charlstm.serving.app import make_app
    from charlstm.serving.requests import Limits
    from charlstm.serving.worker import Worker

    if not address.is_local(socket):
        logger.warning("--host=%s: there is no authentication and no encryption", HOST.value)
    run, model, params = load_model(workdir, CHECKPOINT.value)
    if run.config.sample.method == "window":
        logger.warning("the run samples by windows; the server passes the carry on instead")
    limits = Limits()
    worker = Worker(run, model, params, READERS.value, limits.waiting)
    application = make_app(run, worker, HOST.value, limits)

    def show_address() -> None:
        print(f"{run.workdir.name} writes at {address.url_of(socket)}", flush=True)

    with app.StopSignal("stopping; a second signal exits at once") as stop:
        server.serve(application, socket, worker, limits, stop, show_address)
    return 128 + stop.number if stop.number else 0


if __name__ == "__main__":
    app.run(main, "--port=8080")
