"""Requests in JSON and the checks before them."""

import json
import secrets

import pytest
from conftest import ROOT
from etils import epath

from charlstm.filters import Settings
from charlstm.runs.folder import load_run
from charlstm.serving.guard import RateLimit, is_own_host
from charlstm.serving.requests import Limits, RequestError, parse_read, parse_write

LIMITS = Limits(prompt_characters=20, length=50)


@pytest.fixture(scope="module")
def run():
    return load_run(epath.Path(ROOT / "tests" / "fixtures" / "run_schema_1"))


def test_a_request_has_the_settings_of_the_run_unless_given(run, monkeypatch):
    monkeypatch.setattr(secrets, "randbelow", lambda high: 7)
    found = parse_write(b'{"text": "The"}', run, LIMITS)
    assert run.vocab.decode(found.ids_P) == "The"
    assert found[1:] == (30, Settings(temperature=0.8), 7, 0)
    body = {"text": "The", "length": 50, "seed": 2**32 - 1, "top": 10, "temperature": 0}
    found = parse_write(json.dumps(body | {"top_k": 3}).encode(), run, LIMITS)
    assert found[1:] == (50, Settings(temperature=0, top_k=3), 2**32 - 1, 10)


def test_text_is_cleaned_and_unknown_characters_are_as_asked(run):
    assert parse_read(b'{"text": "said\\r\\nnot"}', run, LIMITS).text == "said\nnot"
    body = {"text": "T\u4e00he", "unknown": "drop"}
    assert parse_read(json.dumps(body).encode(), run, LIMITS).text == "The"
    assert parse_read(b'{"text": ""}', run, LIMITS).text == ""


@pytest.mark.parametrize(
    ("body", "facts"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\x00\xd8", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "The", "temperature": NaN}', "not JSON NaN"),
        (b'{"text": "The", "length": 1' + b"0" * 5000 + b"}", "not JSON"),
        (b"[1]", "JSON object"),
        (b'{"length": 3}', "text: missing"),
        (b'{"text": null}', "text=NoneType string"),
        (b'{"text": "The", "lenght": 3}', "lenght no such field length"),
        (b'{"text": "The", "length": 51}', "length=51: 50"),
        (b'{"text": "The", "length": true}', "length=True: whole number"),
        (b'{"text": "The", "length": "3"}', "length='3': whole number"),
        (b'{"text": "The", "temperature": -1}', "temperature=-1: at least 0"),
        (b'{"text": "The", "top_p": 1e-50}', "top_p=1e-50: above 0"),
        (b'{"text": "The", "temperature": 1' + b"0" * 400 + b"}", "temperature= at most"),
        (b'{"text": "The", "top_k": 1.5}', "top_k=1.5: whole number"),
        (b'{"text": "The", "top_p": 0}', "top_p=0: above 0"),
        (b'{"text": "The", "seed": 4294967296}', "seed=4294967296: 4294967295"),
        (b'{"text": "The", "unknown": "skip"}', "unknown='skip': drop"),
        (b'{"text": "The \\ud800"}', "text: U+D800 position 4"),
        (b'{"text": ""}', "text: no character"),
        (b'{"text": "012345678901234567890"}', "text: 21 characters 20"),
    ],
)
def test_mistakes_in_a_request_are_named_in_one_line(run, body, facts):
    with pytest.raises(RequestError) as caught:
        parse_write(body, run, LIMITS)
    message = str(caught.value)
    assert 400 <= caught.value.status < 500
    assert all(fact in message for fact in facts.split())
    assert len(message.splitlines()) == 1
    assert len(message) < 250


@pytest.mark.parametrize(
    ("header", "is_own"),
    [
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("192.168.1.7", True),
        ("LOCALHOST:80", True),
        ("box.", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example:8000", False),
        ("localhost.evil.example", False),
        ("", False),
        ("[::1", True),
        ("[evil]", False),
    ],
)
def test_only_addresses_and_own_names_are_hosts(header, is_own):
    assert is_own_host(header, {"localhost", "box"}) == is_own


def test_each_address_has_a_burst_and_then_a_rate():
    now = 0.0
    rate = RateLimit(Limits(requests_per_second=2, burst=3), lambda: now)
    assert [rate.take("a") for _ in range(5)] == [True, True, True, False, False]
    assert rate.take("b")
    now = 0.6
    assert [rate.take("a") for _ in range(2)] == [True, False]
    now = 100.0
    assert [rate.take("a") for _ in range(4)] == [True, True, True, False]
