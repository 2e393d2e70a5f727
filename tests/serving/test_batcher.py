"""Readers of one batch, without threads and HTTP."""

import jax
import numpy as np
import pytest
from serving_models import small_model

from charlstm.evaluation.surprise import predict_text
from charlstm.filters import Settings
from charlstm.keys import derive_key
from charlstm.model import predict, zero_carry
from charlstm.serving import batch
from charlstm.serving.batcher import MAX_PIECES, Batcher, End, Piece, Surprise, Task
from charlstm.serving.requests import MAX_TOP, ReadRequest, WriteRequest
from charlstm.streaming import stream

NUM_ROWS = 32
PROMPT, LENGTH, SETTINGS = "The count ", 100, Settings(1.5, top_k=9, min_p=0.01)


@pytest.fixture(scope="module")
def trained():
    return small_model()


@pytest.fixture(scope="module")
def batcher(trained):
    return Batcher(*trained, NUM_ROWS)


class Client(Task):
    """A task whose items are taken at once, unless `is_slow`."""

    def __init__(self, request, is_slow=False):
        super().__init__(request, lambda: None if is_slow else self.receive())
        self.received = []

    def receive(self):
        self.received += self.take()

    @property
    def end(self):
        """Return why the text ended, None if it has not."""
        return next((item.reason for item in self.received if isinstance(item, End)), None)

    def whole(self):
        """Return the characters and their predictions as one Piece."""
        pieces = [item for item in self.received if isinstance(item, Piece)]
        return Piece(*map(np.concatenate, zip(*pieces, strict=True)))


@pytest.fixture
def request_of(trained):
    def make(prompt=PROMPT, length=LENGTH, seed=5, settings=SETTINGS, top=0):
        return WriteRequest(trained[0].vocab.encode(prompt), length, settings, seed, top)

    return make


def finish(batcher, *clients):
    """Add clients and work until all is done."""
    for client in clients:
        batcher.add(client)
    while batcher.turn():
        pass
    return clients


def test_a_text_is_that_of_stream_alone_or_beside_31_others(trained, batcher, request_of):
    run, model, params = trained
    prompt = run.vocab.encode(PROMPT)
    key = derive_key(run.key(5), "sample")
    pieces = stream(model, params, [prompt], key, length=LENGTH, **SETTINGS._asdict())
    [alone] = finish(batcher, Client(request_of()))
    np.testing.assert_array_equal(alone.whole().ids_T, np.concatenate(list(pieces), axis=1)[0])
    # Others come before and after it, with longer prompts, and leave at other times.
    others = [
        Client(request_of("saw blood upon her " * (n % 7 + 1), 20 * n + 1, n, Settings(n / 9), 3))
        for n in range(31)
    ]
    for other in others[:17]:
        batcher.add(other)
        batcher.turn()
    [crowded, *_] = finish(batcher, Client(request_of()), *others[17:])
    for found, wanted in zip(crowded.whole()[:2], alone.whole()[:2], strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert [len(other.whole().ids_T) for other in others] == [20 * n + 1 for n in range(31)]
    assert {other.end for other in others} == {"length"}


def test_bits_and_next_characters_are_those_of_a_softmax(trained, batcher, request_of):
    run, model, params = trained
    [client] = finish(batcher, Client(request_of(length=40, top=4)))
    written = client.whole()
    ids_M = np.concatenate([run.vocab.encode(PROMPT), written.ids_T])
    logits_1MV, _ = jax.jit(lambda ids: predict(model, params, ids, zero_carry(model, 1)))(
        ids_M[None]
    )
    logits_MV = np.asarray(logits_1MV, np.float64)[0, len(PROMPT) - 1 :]
    probs_MV = np.exp(logits_MV) / np.exp(logits_MV).sum(axis=1, keepdims=True)
    own_T = probs_MV[np.arange(40), written.ids_T]
    np.testing.assert_allclose(written.bits_T, -np.log2(own_T), rtol=1e-4, atol=1e-5)
    # Distances between the probabilities of a trained model are far larger than float32's.
    order_TK = np.argsort(-probs_MV[1:], axis=1)[:, :MAX_TOP]
    np.testing.assert_array_equal(written.top_ids_TK, order_TK)
    top_TK = np.take_along_axis(probs_MV[1:], order_TK, axis=1)
    np.testing.assert_allclose(written.top_probs_TK, top_TK, rtol=1e-4)


def test_a_slow_reader_pauses_and_loses_nothing(batcher, request_of):
    length = (MAX_PIECES + 3) * batch.CHUNK_LEN
    [fast] = finish(batcher, Client(request_of(length=length)))
    slow, other = Client(request_of(length=length), is_slow=True), Client(request_of(seed=1))
    finish(batcher, slow, other)
    assert slow.is_full
    assert slow.end is None
    assert other.end == "length"
    while slow.end is None:
        slow.receive()
        finish(batcher)
    np.testing.assert_array_equal(slow.whole().ids_T, fast.whole().ids_T)


def test_readers_who_leave_free_their_rows(batcher, request_of):
    left = [Client(request_of(length=10**6), is_slow=True) for _ in range(2 * NUM_ROWS)]
    [last] = finish(batcher, *left, Client(request_of()))[-1:]
    assert last.end is None
    assert batcher.num_waiting == NUM_ROWS + 1
    for client in left:
        client.is_left = True
    finish(batcher)
    assert last.end == "length"
    assert batcher.tasks() == []


def test_a_text_of_documents_ends_with_the_document(trained, batcher, request_of):
    evenly = Settings(1e6)  # all characters are about as probable
    [client] = finish(batcher, Client(request_of(length=10**4, settings=evenly)))
    assert client.end == "document"
    assert trained[1].end_id not in client.whole().ids_T


@pytest.mark.parametrize("length", [1, 600, 1100])
def test_read_returns_the_surprise_and_the_next_characters(trained, batcher, book, length):
    run, model, params = trained
    ids_M = run.vocab.encode(book[:length], "drop")
    [client] = finish(batcher, Client(ReadRequest(book, ids_M)))
    found = client.received[0]
    assert isinstance(found, Surprise)
    assert client.received[1:] == [End("length")]
    longer = predict_text(model, params, np.append(ids_M, 3), MAX_TOP)
    np.testing.assert_array_equal(found.bits_M, longer.bits_M[:-1])
    np.testing.assert_array_equal(found.top_ids_K, longer.top_ids_MK[-1])


def test_nothing_is_compiled_after_the_first_requests(batcher, request_of):
    programs = batch.write_chunk, batch.read_prompts, batch.place
    finish(batcher, Client(request_of()))
    sizes = [program._cache_size() for program in programs]
    clients = [Client(request_of("said not " * n, 7 * n, n, Settings(0), n % 3)) for n in (1, 30)]
    finish(batcher, *clients)
    assert [program._cache_size() for program in programs] == sizes
