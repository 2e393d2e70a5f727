"""The server over real sockets: its answers, its limits, and clients that misbehave."""

import http.client
import json
import socket
import threading
import time
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from serving_models import small_model

from charlstm.errors import UserError
from charlstm.evaluation.surprise import predict_text
from charlstm.serving import address, server
from charlstm.serving.app import make_app
from charlstm.serving.requests import Limits
from charlstm.serving.worker import Worker

NUM_ROWS = 32
LIMITS = Limits(length=10**6, connections=40, burst=10**6)
REQUEST = {"text": "The count ", "length": 60, "temperature": 1.5, "seed": 3}


@pytest.fixture(scope="module")
def trained():
    return small_model()


@contextmanager
def served(trained, limits):
    """Yield the address of a server in a thread, and the server's worker."""
    run, *_ = trained
    worker = Worker(*trained, NUM_ROWS, limits.waiting)
    listener, is_over, is_ready = address.bind("127.0.0.1", 0), threading.Event(), threading.Event()
    app = make_app(run, worker, "127.0.0.1", limits)
    arguments = app, listener, worker, limits, is_over.is_set, is_ready.set
    thread = threading.Thread(target=server.serve, args=arguments)
    thread.start()
    assert is_ready.wait(60)
    yield address.url_of(listener), worker
    is_over.set()
    thread.join(20)
    assert not thread.is_alive()
    assert worker.failure is None


@pytest.fixture(scope="module")
def site(trained):
    with served(trained, LIMITS) as (url, worker):
        yield url, worker


@pytest.fixture(scope="module")
def hasty_site(trained):
    """Return the address and the worker of a server that waits for a client for one second."""
    with served(trained, LIMITS._replace(seconds=1.0)) as (url, worker):
        yield url, worker


@pytest.fixture
def client(site):
    with httpx.Client(base_url=site[0], timeout=20) as client:
        yield client


def events_of(text):
    """Return (name, data) of each event of a stream."""
    for block in text.removesuffix("\n\n").split("\n\n"):
        *names, data = block.split("\n")
        name = names[0].removeprefix("event: ") if names else ""
        yield name, json.loads(data.removeprefix("data: "))


@pytest.fixture
def connect():
    """Return connect(url, head, body) -> a socket to which a request was sent."""
    with ExitStack() as opened:

        def send(url, head=(), body=b""):
            host, port = url.removeprefix("http://").removesuffix("/").split(":")
            connection = opened.enter_context(socket.create_connection((host, int(port)), 20))
            if head:
                lines = [*head, f"host: {host}", "content-type: application/json", "", ""]
                connection.sendall("\r\n".join(lines).encode() + body)
            return connection

        yield send


@pytest.fixture
def open_stream(connect):
    """Return open_stream(url, **fields) -> a socket to which a request for a text was sent."""

    def send(url, **fields):
        body = json.dumps(REQUEST | fields).encode()
        return connect(url, ["POST /api/write HTTP/1.1", f"content-length: {len(body)}"], body)

    return send


def read_all(connection):
    """Return status and body of an answer after which the server closes the connection."""
    answer = http.client.HTTPResponse(connection, method="POST")
    answer.begin()
    return answer.status, answer.read()


def read_rest(stream):
    return b"".join(iter(lambda: stream.recv(2**16), b""))


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_write_streams_a_text_with_bits_and_next_characters(client):
    answer = client.post("/api/write", json=REQUEST | {"top": 2})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *pieces, end = events_of(answer.text)
    assert end == ("end", {"reason": "length", "characters": 60, "seed": 3})
    assert {name for name, _ in pieces} == {""}
    text = "".join(data["text"] for _, data in pieces)
    assert len(text) == 60
    read = client.post("/api/read", json={"text": REQUEST["text"] + text}).json()
    bits = [bits for _, data in pieces for bits in data["bits"]]
    assert bits == pytest.approx(read["surprise"][-60:], abs=2e-4)
    tops = [top for _, data in pieces for top in data["next"]]
    assert {len(top) for top in tops} == {2}
    assert tops[-1] == read["next"][:2]


def test_without_a_seed_texts_differ_and_their_seed_repeats_them(client):
    def write(**seed):
        fields = {"text": "The count ", "length": 60, "temperature": 1.5} | seed
        *pieces, end = events_of(client.post("/api/write", json=fields).text)
        return "".join(data["text"] for _, data in pieces), end[1]["seed"]

    (text, seed), (other, other_seed) = write(), write()
    assert text != other
    assert seed != other_seed
    assert write(seed=seed) == (text, seed)


def test_read_and_model_describe_text_and_model(client, trained):
    run, model, params = trained
    answer = client.post("/api/read", json={"text": "The count"}).json()
    whole = predict_text(model, params, run.vocab.encode("The count "), 10)
    assert answer["text"] == "The count"
    assert answer["surprise"][0] is None
    assert answer["surprise"][1:] == pytest.approx(whole.bits_M[1:-1].tolist(), abs=1e-4)
    names = [run.vocab.characters[index] for index in whole.top_ids_MK[-1]]
    assert [name for name, _ in answer["next"]] == names
    assert client.post("/api/read", json={"text": ""}).json()["next"] == []
    about = client.get("/api/model").json()
    assert about["name"] == "run_schema_1"
    assert tuple(about["characters"]) == run.vocab.characters
    assert about["limits"]["length"] == LIMITS.length


def test_mistakes_get_a_status_and_one_line_of_json(client):
    json_type = {"content-type": "application/json"}
    cases = [
        (client.post("/api/write", content=b"{", headers=json_type), 400, "not JSON"),
        (client.post("/api/read", json={"text": 3}), 400, "text=3"),
        (client.post("/api/read", content=bytes(10**7), headers=json_type), 413, "262,144"),
        (client.post("/api/write", content=b"{}"), 415, "application/json"),
        (client.get("/api/write"), 405, "GET /api/write"),
        (client.get("/none"), 404, "/none"),
        (client.get("/api/model", headers={"host": "evil.example"}), 403, "evil.example"),
        (client.post("/api/read", headers={"origin": "http://evil.example"}), 403, "evil.example"),
    ]
    for answer, status, fact in cases:
        assert answer.status_code == status
        [line] = answer.text.splitlines()
        assert fact in json.loads(line)["error"]
        assert "access-control-allow-origin" not in answer.headers


def test_clients_that_are_too_slow_or_speak_no_http_get_errors(hasty_site, connect):
    url, _ = hasty_site
    idle, not_http = connect(url), connect(url)
    not_http.sendall(b"\x16\x03\x01 garbage\r\n\r\n")
    slow_body = connect(url, ["POST /api/read HTTP/1.1", "content-length: 9"], b"{")
    assert [read_all(each)[0] for each in (not_http, slow_body, idle)] == [400, 408, 408]


def test_clients_that_leave_or_do_not_read_free_their_rows(hasty_site, open_stream):
    url, worker = hasty_site
    streams = [open_stream(url, length=10**6, top=10) for _ in range(NUM_ROWS + 3)]
    wait_until(lambda: worker.num_waiting == 3)
    for stream in streams[:3]:
        stream.close()
    wait_until(lambda: worker.num_waiting == 0)
    # The others are disconnected.
    wait_until(lambda: worker.num_tasks == 0)
    assert b"event: end" not in read_rest(streams[-1])
    assert httpx.post(f"{url}api/write", json=REQUEST).status_code == 200


def test_more_connections_than_allowed_get_503(site, open_stream):
    url, _ = site
    streams = [open_stream(url, length=10_000) for _ in range(200)]
    answers = [read_all(stream) for stream in streams[LIMITS.connections :]]
    assert {status for status, _ in answers} == {503}
    assert all("connections" in json.loads(body)["error"] for _, body in answers)
    assert read_all(streams[0])[0] == 200
    for stream in streams:
        stream.close()
    wait_until(lambda: httpx.get(f"{url}api/model").status_code == 200)


def test_a_server_that_stops_ends_its_texts(trained, open_stream):
    with served(trained, LIMITS) as (url, worker):
        stream = open_stream(url, length=10**6)
        wait_until(lambda: worker.num_tasks > 0)
    [*_, (name, data)] = events_of(read_all(stream)[1].decode())
    assert (name, data["reason"]) == ("end", "stop")


def test_the_page_reads_and_writes_by_the_server(site, browser, client):
    url, worker = site
    tab, problems = browser.new_page(), []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto(url)
    tab.fill("#text", "The count ")
    answer = client.post("/api/read", json={"text": "The count "}).json()
    shown = {"\n": "line end", " ": "space"}
    names = [shown.get(character, character) for character, _ in answer["next"]]
    tab.wait_for_selector(f"#next li:first-child bdi:text-is('{names[0]}')")
    assert tab.locator("#next bdi").all_text_contents() == names
    tab.fill("#length", "200")
    tab.click("#write")
    tab.wait_for_selector("#status:has-text('Done: 200 characters')")
    text = tab.input_value("#text")
    assert text.startswith("The count ")
    assert len(text) == 210
    # Stop ends the text on the server too, and a refusal is shown.
    tab.fill("#length", "100000")
    tab.click("#write")
    tab.wait_for_selector("#write:text-is('Stop')")
    tab.click("#write")
    tab.wait_for_selector("#status:has-text('Stopped')")
    wait_until(lambda: worker.num_tasks == 0)
    assert problems == []
    tab.fill("#text", "The count " * 2001)
    tab.wait_for_selector("#notice:has-text('20,010 characters')")
    tab.close()


def test_an_address_that_cannot_be_bound_is_one_line(site):
    port = int(site[0].removesuffix("/").rpartition(":")[2])
    with pytest.raises(UserError, match=rf"--port={port}: Address already in use"):
        address.bind("127.0.0.1", port)
    with pytest.raises(UserError, match="--host=no such host: no such address"):
        address.bind("no such host", 0)
    with pytest.raises(UserError, match=r"--host=203\.0\.113\.1"):
        address.bind("203.0.113.1", 0)
