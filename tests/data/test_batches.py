"""Batches as a function of the step: each target once, in the right order."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from charlstm.config import base_config
from charlstm.data.batches import (
    Streams,
    Windows,
    evaluation_batches,
    read_steps,
    split,
    training_batches,
)
from charlstm.errors import UserError

fast = settings(deadline=None, max_examples=60)


def text_of(size: int) -> np.ndarray:
    """A text whose characters are their own positions."""
    return np.arange(size, dtype=np.uint16)


def epoch_of(batches, epoch: int = 0) -> list:
    steps = batches.steps_per_epoch
    return [batches(epoch * steps + index) for index in range(steps)]


def counted_targets(batches_of_epoch) -> list[int]:
    return sorted(
        int(target)
        for batch in batches_of_epoch
        for target in batch.targets_BT[batch.weights_BT == 1]
    )


def assert_same_batches(batches_a, batches_b) -> None:
    for a, b in zip(batches_a, batches_b, strict=True):
        for leaf_a, leaf_b in zip(a, b, strict=True):
            np.testing.assert_array_equal(leaf_a, leaf_b)


def small_config(batch_size: int, seq_len: int, order: str = "streams", loss_on: str = "all"):
    config = base_config()
    config.batch_size = batch_size
    config.seq_len = seq_len
    config.data.order = order
    config.data.loss_on = loss_on
    return config


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    "kind",
    [Streams, lambda *args: Streams(*args, context=8), Windows, lambda *a: Windows(*a, False)],
)
def test_batches_have_fixed_shapes_and_types(kind, dtype):
    batches = kind(np.arange(40, dtype=dtype), 3, 4)
    for batch in epoch_of(batches):
        leaves = {name: (leaf.dtype, leaf.shape) for name, leaf in batch._asdict().items()}
        assert leaves == {
            "inputs_BT": (np.int32, (3, 4)),
            "targets_BT": (np.int32, (3, 4)),
            "weights_BT": (np.float32, (3, 4)),
            "reset_B": (np.bool_, (3,)),
        }


# --- Streams ---


@st.composite
def any_streams(draw, with_room=False):
    batch_size = draw(st.integers(1, 6))
    seq_len = draw(st.integers(1, 7))
    context = seq_len * draw(st.integers(0, 2))
    # With room: the text before the second stream holds its whole context.
    shortest = max(1, context) if with_room else 1
    size = draw(st.integers(batch_size * shortest + 1, 120))
    return Streams(text_of(size), batch_size, seq_len, context)


@fast
@given(any_streams())
def test_epoch_of_streams_counts_each_target_once(batches):
    epoch = epoch_of(batches)
    assert {float(weight) for batch in epoch for weight in batch.weights_BT.flat} <= {0.0, 1.0}
    assert counted_targets(epoch) == list(range(1, len(batches.ids_M)))
    # No step is empty.
    assert epoch[-1].weights_BT.any()


@fast
@given(any_streams())
def test_target_is_the_next_character(batches):
    for batch in epoch_of(batches):
        counts_BT = batch.weights_BT == 1
        inputs, targets = batch.inputs_BT[counts_BT], batch.targets_BT[counts_BT]
        assert targets.tolist() == [position + 1 for position in inputs]


@fast
@given(any_streams())
def test_concatenated_streams_are_the_text(batches):
    epoch = epoch_of(batches)
    text = [
        int(character)
        for stream in range(batches.batch_size)
        for batch in epoch
        for character in batch.inputs_BT[stream][batch.weights_BT[stream] == 1]
    ]
    assert text == list(range(len(batches.ids_M) - 1))


@fast
@given(any_streams())
def test_streams_differ_in_length_by_at_most_one(batches):
    lengths = np.diff(batches.bounds).tolist()
    assert len(lengths) == batches.batch_size
    assert sum(lengths) == len(batches.ids_M) - 1
    assert max(lengths) - min(lengths) <= 1


@fast
@given(any_streams(with_room=True))
def test_stream_reads_its_context_before_its_part(batches):
    epoch = epoch_of(batches)
    inputs = np.concatenate([batch.inputs_BT for batch in epoch], axis=1)
    weights = np.concatenate([batch.weights_BT for batch in epoch], axis=1)
    context = batches.context
    for stream, (begin, end) in enumerate(
        zip(batches.bounds[:-1].tolist(), batches.bounds[1:].tolist(), strict=True)
    ):
        # The first stream has nothing before it.
        first = 0 if stream == 0 else begin - context
        read = inputs[stream, context - (begin - first) : context + end - begin]
        assert read.tolist() == list(range(first, end))
        counted = np.flatnonzero(weights[stream]).tolist()
        assert counted == list(range(context, context + end - begin))


@fast
@given(any_streams(with_room=True))
def test_carry_resets_at_the_beginning_of_epoch_and_text(batches):
    for window, batch in enumerate(epoch_of(batches)):
        wanted = [
            window == 0 or (stream == 0 and window == batches.context // batches.seq_len)
            for stream in range(batches.batch_size)
        ]
        assert batch.reset_B.tolist() == wanted


@fast
@given(any_streams(), st.integers(1, 3))
def test_epochs_of_streams_are_equal(batches, epoch):
    assert_same_batches(epoch_of(batches, epoch), epoch_of(batches))


def test_state_resets_depend_on_seed_step_and_row_only():
    text, rate, num_steps = text_of(5001), 0.25, 2000
    plain = Streams(text, 5, 10)
    chancy = Streams(text, 5, 10, state_reset_prob=rate, seed=3)
    steps_S = np.arange(num_steps)
    resets_SB = chancy(steps_S).reset_B
    assert_same_batches(
        [plain(steps_S)], [chancy(steps_S)._replace(reset_B=plain(steps_S).reset_B)]
    )
    assert np.all(resets_SB >= plain(steps_S).reset_B)
    # A single step, and some of its rows, agree.
    for step in (0, 1, 999):
        np.testing.assert_array_equal(chancy(step).reset_B, resets_SB[step])
        np.testing.assert_array_equal(chancy(step, slice(2, 4)).reset_B, resets_SB[step, 2:4])
    # The share of n draws has the standard deviation sqrt(p (1 - p) / n).
    drawn = resets_SB[~plain(steps_S).reset_B]
    assert abs(drawn.mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / drawn.size)
    # Rows, epochs and seeds are independent.
    per_epoch = chancy.steps_per_epoch
    other = Streams(text, 5, 10, state_reset_prob=rate, seed=4)(steps_S).reset_B
    pairs = [
        (resets_SB[:, 0], resets_SB[:, 1]),
        (resets_SB[:-per_epoch], resets_SB[per_epoch:]),
        (resets_SB, other),
    ]
    for one, another in pairs:
        assert abs(np.mean(one == another) - (rate**2 + (1 - rate) ** 2)) < 0.06


# --- Windows ---


@st.composite
def any_windows(draw):
    seq_len = draw(st.integers(1, 7))
    return Windows(
        text_of(draw(st.integers(seq_len + 1, 60))),
        draw(st.integers(1, 9)),
        seq_len,
        last_only=draw(st.booleans()),
        seed=draw(st.none() | st.integers(0, 3)),
    )


def patterns_of(batches_of_epoch) -> list[tuple[list[int], int]]:
    """Each counted window with the character after it, in order."""
    return [
        (inputs.tolist(), int(targets[-1]))
        for batch in batches_of_epoch
        for inputs, targets, weights in zip(*batch[:3], strict=True)
        if weights.any()
    ]


@fast
@given(any_windows(), st.integers(0, 2))
def test_epoch_has_each_window_and_its_target_once(batches, epoch):
    text, size = batches.ids_M.tolist(), batches.seq_len
    wanted = [(text[i : i + size], text[i + size]) for i in range(len(text) - size)]
    patterns = patterns_of(epoch_of(batches, epoch))
    assert sorted(patterns) == wanted
    assert batches.num_windows == len(wanted)
    if batches.seed is None:
        assert patterns == wanted


@fast
@given(any_windows())
def test_window_counts_its_last_target_or_all(batches):
    one_window = (
        [0.0] * (batches.seq_len - 1) + [1.0] if batches.last_only else [1.0] * batches.seq_len
    )
    rows = [row for batch in epoch_of(batches) for row in zip(*batch, strict=True)]
    for index, (inputs, targets, weights, reset) in enumerate(rows):
        # Only the end of the last batch is padded.
        is_real = index < batches.num_windows
        assert weights.tolist() == (one_window if is_real else [0.0] * batches.seq_len)
        assert targets.tolist() == [position + 1 for position in inputs]
        assert reset
    assert 0 <= len(rows) - batches.num_windows < batches.batch_size


def test_orders_of_seeds_and_epochs_are_uncorrelated():
    # The correlation of two permutations of n has the standard deviation n^(-1/2).
    size = 100_000
    ids = np.arange(size + 1)  # the character at a position is its number

    def order(seed, epoch):
        batches = Windows(ids, batch_size=1000, seq_len=1, seed=seed)
        steps = epoch * batches.steps_per_epoch + np.arange(batches.steps_per_epoch)
        return batches(steps).inputs_BT.ravel()

    orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    for (one, first), (other, second) in itertools.combinations(orders.items(), 2):
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.03, (one, other)
        # Nor is one a shift of the other.
        assert np.mean(first[1:] == second[:-1]) < 0.001
    for first in orders.values():
        np.testing.assert_array_equal(np.sort(first), ids[:-1])
        assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.03


@pytest.mark.parametrize(
    "make",
    [
        lambda: Streams(text_of(50), 3, 4),
        lambda: Streams(text_of(50), 3, 4, context=8),
        lambda: Windows(text_of(50), 7, 4, seed=1),
        lambda: Windows(text_of(50), 7, 4, last_only=False),
    ],
)
def test_batch_depends_on_the_step_only(make):
    batches = make()
    steps = list(range(3 * batches.steps_per_epoch))
    in_order = [batches(step) for step in steps]
    random.Random(0).shuffle(steps)
    assert_same_batches([batches(step) for step in steps], [in_order[step] for step in steps])
    # New objects give the same batches.
    assert_same_batches([make()(step) for step in steps], [in_order[step] for step in steps])


def test_interleaved_orders_are_independent():
    # They share one cached permutation.
    batches_a, batches_b = (Windows(text_of(50), 7, 4, seed=seed) for seed in (1, 2))
    alone = epoch_of(batches_a)
    mixed = [(batches_a(step), batches_b(step))[0] for step in range(len(alone))]
    assert_same_batches(mixed, alone)


# --- from a config ---


@fast
@given(st.integers(0, 300), st.floats(0, 0.999), st.integers(0, 60))
def test_split_holds_out_the_end_up_to_a_limit(size, fraction, limit):
    data = ConfigDict({"val_fraction": fraction, "max_val_chars": limit})
    train_ids, val_ids = split(text_of(size), data)
    wanted = round(size * fraction)
    assert len(val_ids) == (min(wanted, limit) if limit else wanted)
    assert train_ids.tolist() + val_ids.tolist() == list(range(size))


def test_too_many_windows_to_shuffle_are_refused():
    ids_M = np.broadcast_to(np.uint16(0), 2**24 + 6)
    config = small_config(3, 5, "windows", "all")
    with pytest.raises(UserError, match=r"order=windows: .*16,777,217.*16,777,216.*streams"):
        training_batches(ids_M, config)
    assert training_batches(ids_M[1:], config).num_windows == 2**24
    with pytest.raises(ValueError, match=r"ids_M: .*16,777,217"):
        Windows(ids_M, 3, 5, seed=0)
    assert Windows(ids_M, 3, 5).num_windows == 2**24 + 1  # in the order of the text


@pytest.mark.parametrize(
    ("order", "loss_on", "kind"),
    [("streams", "all", Streams), ("windows", "all", Windows), ("windows", "last", Windows)],
)
def test_training_batches_follow_the_config(order, loss_on, kind):
    config = small_config(3, 5, order, loss_on)
    config.seed = 7
    batches = training_batches(text_of(100), config)
    assert type(batches) is kind
    assert (batches.batch_size, batches.seq_len) == (3, 5)
    if kind is Streams:
        assert batches.context == 0
    else:
        assert (batches.last_only, batches.seed) == (loss_on == "last", 7)


@pytest.mark.parametrize("order", ["streams", "windows"])
@pytest.mark.parametrize("size", [0, 1, 9, 10])
def test_text_shorter_than_a_window_is_refused(order, size):
    with pytest.raises(UserError) as error:
        training_batches(text_of(size), small_config(4, 10, order))
    message = str(error.value)
    assert message.startswith("config.seq_len=10: ")
    assert f"{size} characters" in message
    assert "\n" not in message


@pytest.mark.parametrize(("order", "smallest"), [("streams", 41), ("windows", 14)])
def test_smallest_text_for_a_batch(order, smallest):
    config = small_config(4, 10, order)
    with pytest.raises(UserError) as error:
        training_batches(text_of(smallest - 1), config)
    message = str(error.value)
    assert message.startswith("config.batch_size=4: ")
    assert f"at least {smallest} characters" in message
    assert f"there are {smallest - 1};" in message
    assert "\n" not in message
    # One full batch, in which everything counts.
    batches = training_batches(text_of(smallest), config)
    assert batches.steps_per_epoch == 1
    assert batches(0).weights_BT.all()


@fast
@given(st.integers(2, 90), st.integers(1, 6), st.integers(1, 7), st.sampled_from([None, 1, 2]))
def test_evaluation_streams_count_each_target_once(size, batch_size, seq_len, at_most):
    batches = evaluation_batches(text_of(size), small_config(batch_size, seq_len), at_most)
    epoch = epoch_of(batches)
    assert counted_targets(epoch) == list(range(1, size))
    assert batches.batch_size <= (at_most or batch_size)
    assert epoch[0].inputs_BT.shape == (batches.batch_size, seq_len)
    # Each stream except the first reads a window of context.
    before = epoch[0].inputs_BT[1:].tolist()
    begins = batches.bounds[1:-1].tolist()
    assert before == [list(range(begin - seq_len, begin)) for begin in begins]


@pytest.mark.parametrize(
    ("size", "num_streams"),
    [(2, 1), (39, 1), (40, 2), (60, 2), (80, 4), (99, 4), (100, 5), (1000, 5)],
)
def test_evaluation_reads_a_short_text_in_fewer_streams(size, num_streams):
    assert evaluation_batches(text_of(size), small_config(5, 10)).batch_size == num_streams


@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_evaluation_windows_count_each_target_once(loss_on):
    batches = evaluation_batches(text_of(47), small_config(4, 10, "windows", loss_on))
    targets = counted_targets(epoch_of(batches))
    # Targets without a full window before them may count too.
    assert [target for target in targets if target >= 10] == list(range(10, 47))
    assert len(set(targets)) == len(targets)


@pytest.mark.parametrize(("order", "shortest"), [("streams", 2), ("windows", 11)])
def test_shortest_text_to_evaluate(order, shortest):
    config = small_config(4, 10, order, "last" if order == "windows" else "all")
    for size in range(shortest):
        with pytest.raises(UserError) as error:
            evaluation_batches(text_of(size), config)
        message = str(error.value)
        assert f"a text of {size} character" in message
        assert "config.data.val_fraction" in message
        assert "\n" not in message
    batches = evaluation_batches(text_of(shortest), config)
    assert counted_targets(epoch_of(batches)) == [shortest - 1]


IDS = np.random.default_rng(0).integers(50, size=1003).astype(np.uint8)


@pytest.mark.parametrize(
    "batches",
    [
        Streams(IDS, batch_size=7, seq_len=10, context=10),
        Windows(IDS, batch_size=64, seq_len=10, seed=3),
        Windows(IDS, batch_size=64, seq_len=10, last_only=False),
    ],
)
def test_read_steps_equals_single_steps(batches):
    # Across the ends of two epochs.
    first, count = batches.steps_per_epoch - 2, batches.steps_per_epoch + 4
    steps_S = read_steps(batches, first, count, capacity=count + 3)
    for index in range(count):
        for leaf_S, wanted in zip(steps_S, batches(first + index), strict=True):
            assert leaf_S.dtype == wanted.dtype
            np.testing.assert_array_equal(leaf_S[index], wanted)
    for leaf_S in steps_S:
        assert len(leaf_S) == count + 3
        assert not leaf_S[count:].any()


TEXT_M = np.arange(10)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (Streams, {"ids_M": "abc"}, "ids_M: must be an array of integers"),
        (Streams, {"ids_M": TEXT_M[None]}, "ids_M: must be .* the shape"),
        (Windows, {"ids_M": TEXT_M / 2}, "ids_M: must be .*float64"),
        (Streams, {"ids_M": TEXT_M[:0]}, "ids_M: has 0 character"),
        (Windows, {"ids_M": TEXT_M[:1]}, "ids_M: has 1 character"),
        (Streams, {"batch_size": 0}, "batch_size=0: must be"),
        (Streams, {"batch_size": 10}, "batch_size=10: .* at most 9 streams"),
        (Windows, {"batch_size": 1.5}, "batch_size=1.5: must be"),
        (Streams, {"seq_len": 0}, "seq_len=0: must be"),
        (Windows, {"seq_len": 10}, "seq_len=10: .* at most 9"),
        (Streams, {"context": 4}, "context=4: must be a multiple of seq_len=3"),
        (Streams, {"context": -3}, "context=-3: must be"),
        (Streams, {"state_reset_prob": 1.0}, "state_reset_prob=1.0: must be"),
        (Streams, {"seed": -1}, "seed=-1: must be"),
        (Windows, {"seed": None, "seq_len": -1}, "seq_len=-1: must be"),
    ],
)
def test_invalid_arguments_are_refused(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**{"ids_M": TEXT_M, "batch_size": 2, "seq_len": 3} | arguments)
