"""The model is causal, and only the carry passes from one window to the next."""

import re
from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_equal
from lstm_numpy import lstm

from charlstm.data.batches import Batch
from charlstm.model import CharLSTM, hidden_mask, hidden_states, predict, zero_carry
from charlstm.steps import cross_entropy

# All different, to detect swapped axes.
B, T, V, H = 3, 6, 11, 10
# Each pair of an input, a number of layers and a recurrence.
KINDS = [
    ("one_hot", 1, "fused"),
    ("one_hot", 2, "flax"),
    ("embed", 1, "flax"),
    ("embed", 2, "fused"),
    ("scaled", 1, "flax"),
    ("scaled", 2, "fused"),
]


def make_model(input="one_hot", num_layers=1, recurrence="fused", **fields):
    return CharLSTM(V, H, num_layers, input=input, embed_size=5, recurrence=recurrence, **fields)


def draw_params(model, seed=0):
    """Return random parameters, biases included, as after training."""
    ids_BT = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids_BT, zero_carry(model, 1))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(rng.normal(0, 0.5, leaf.shape)), shapes)


def draw_ids(seed=0, length=T):
    return np.random.default_rng(seed).integers(V, size=(B, length), dtype=np.int32)


def draw_carry(model, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(partial(zero_carry, model, B))
    return jax.tree.map(lambda leaf: np.float32(rng.normal(size=leaf.shape)), shapes)


@lru_cache
def compiled(model):
    return jax.jit(partial(predict, model))


def compiled_predict(model, params):
    """Return the compiled predict of `model` with these parameters filled in."""
    return partial(compiled(model), params)


@pytest.fixture(scope="module", params=KINDS, ids="{0[0]}-{0[1]}-{0[2]}".format)
def kind(request):
    """Return a model, its parameters, and its compiled predict."""
    input, num_layers, recurrence = request.param
    model = make_model(input, num_layers, recurrence)
    params = draw_params(model)
    return SimpleNamespace(model=model, params=params, predict=compiled_predict(model, params))


def other_ids(ids):
    """Return ids that differ from `ids` by enough to matter for input='scaled'."""
    return (ids + V // 2) % V


def test_logits_depend_on_all_earlier_characters_and_no_later(kind):
    ids_BT, carry = draw_ids(), draw_carry(kind.model)
    logits_BTV, _ = kind.predict(ids_BT, carry)
    for time in range(T):
        changed_BT = ids_BT.copy()
        changed_BT[:, time] = other_ids(ids_BT[:, time])
        change_BT = np.abs(kind.predict(changed_BT, carry)[0] - logits_BTV).max(axis=-1)
        # The same operations on the same numbers: equal up to noise.
        assert np.all(change_BT[:, :time] < 1e-6)
        assert np.all(change_BT[:, time:] > 1e-5)


def test_rows_of_a_batch_do_not_influence_each_other(kind):
    ids_BT, carry = draw_ids(), draw_carry(kind.model)
    before = kind.predict(ids_BT, carry)
    changed_BT = ids_BT.copy()
    changed_BT[1] = other_ids(ids_BT[1])
    in_row_1_B1 = np.eye(B, dtype=np.float32)[1][:, None]
    changed_carry = jax.tree.map(lambda leaf_BH: leaf_BH + in_row_1_B1, carry)
    after = kind.predict(changed_BT, changed_carry)
    for found, wanted in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_allclose(found[::2], wanted[::2], atol=1e-6)
        assert np.abs(found[1] - wanted[1]).max() > 1e-3


def test_half_windows_and_single_steps_match_the_whole_window(kind):
    ids_BT, carry = draw_ids(), draw_carry(kind.model)
    whole = kind.predict(ids_BT, carry)
    assert np.abs(whole[0]).max() > 0.1
    for width in (T // 2, 1):
        pieces, memory = [], carry
        for begin in range(0, T, width):
            logits_BTV, memory = kind.predict(ids_BT[:, begin : begin + width], memory)
            pieces.append(logits_BTV)
        assert_close((np.concatenate(pieces, axis=1), memory), whole)


def test_carry_changes_the_logits(kind):
    ids_BT = draw_ids()
    empty, full = (
        kind.predict(ids_BT, carry)[0]
        for carry in (zero_carry(kind.model, B), draw_carry(kind.model))
    )
    assert np.abs(full - empty).max() > 1e-2


@pytest.mark.parametrize(("input", "num_layers"), [("one_hot", 1), ("embed", 2), ("scaled", 2)])
def test_fused_and_flax_share_parameters_and_logits(input, num_layers):
    fused, flax = (make_model(input, num_layers, name) for name in ("fused", "flax"))
    arguments = jax.random.key(3), jnp.zeros((1, 1), jnp.int32), zero_carry(fused, 1)
    trees = [jax.eval_shape(model.init, *arguments)["params"] for model in (fused, flax)]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
    assert jax.tree.leaves(trees[0]) == jax.tree.leaves(trees[1])  # shapes and types
    params, ids_BT, carry = draw_params(fused), draw_ids(), draw_carry(fused)
    found, wanted = (compiled_predict(m, params)(ids_BT, carry) for m in (fused, flax))
    assert_close(found, wanted)


END_ID = 4


@pytest.mark.parametrize(
    ("input", "num_layers", "recurrence"),
    [("one_hot", 1, "fused"), ("embed", 2, "flax"), ("scaled", 2, "fused")],
)
def test_a_document_does_not_depend_on_the_text_before_it(input, num_layers, recurrence):
    model = make_model(input, num_layers, recurrence, end_id=END_ID)
    ids_BT = other_ids(np.full((B, T), END_ID, np.int32)) + draw_ids() % 2
    assert not np.any(ids_BT == END_ID)
    for row, time in enumerate((0, 2, T - 1)):
        ids_BT[row, time] = END_ID
    logits_BTV, last = compiled_predict(model, draw_params(model))(ids_BT, draw_carry(model))
    plain = make_model(input, num_layers, recurrence)
    predict_plain = compiled_predict(plain, draw_params(model))
    for row, time in enumerate((0, 2, T - 1)):
        # From END on: a model without documents, from a zero carry.
        alone, alone_last = predict_plain(ids_BT[row : row + 1, time:], zero_carry(plain, 1))
        found_last = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], last)
        assert_close((logits_BTV[row : row + 1, time:], found_last), (alone, alone_last))
        # Before END: the carry of the call counts.
        before = predict_plain(ids_BT, draw_carry(model))[0]
        assert_close(logits_BTV[row, :time], before[row, :time])
        assert np.abs(before[row, time:] - logits_BTV[row, time:]).max() > 1e-3


def test_tied_logits_match_numpy():
    model = make_model("embed", tie_embeddings=True)
    params, ids_BT, carry = draw_params(model), draw_ids(), draw_carry(model)
    assert params.keys() == {"embed", "lstm_0", "dense", "bias"}
    table_VE = np.float64(params["embed"]["embedding"])
    assert table_VE.shape == (V, 5)
    c_h = jax.tree.map(np.float64, carry[0])
    lstm_params = jax.tree.map(np.float64, params["lstm_0"])
    _, hidden_TBH = lstm(lstm_params, c_h, table_VE[ids_BT.T])
    dense = jax.tree.map(np.float64, params["dense"])
    wanted_TBV = (hidden_TBH @ dense["kernel"] + dense["bias"]) @ table_VE.T + params["bias"]
    logits_BTV, _ = compiled_predict(model, params)(ids_BT, carry)
    assert logits_BTV.dtype == jnp.float32
    np.testing.assert_allclose(logits_BTV, wanted_TBV.swapaxes(0, 1), atol=1e-4)


@pytest.mark.parametrize("input", ["one_hot", "scaled"])
def test_tie_embeddings_needs_embeddings(input):
    with pytest.raises(ValueError, match=f"tie_embeddings=True: .*'{input}'"):
        draw_params(make_model(input, tie_embeddings=True))


def test_fused_and_flax_have_the_same_initial_parameters():
    models = make_model("embed"), make_model("embed", recurrence="flax")
    arguments = jax.random.key(5), jnp.zeros((1, 1), jnp.int32), zero_carry(models[0], 1)
    one, other = (jax.jit(model.init)(*arguments)["params"] for model in models)
    assert_equal(one, other)


def test_a_row_alone_matches_the_row_in_a_batch():
    model = make_model(num_layers=2)
    ids_BT, carry = draw_ids(), draw_carry(model)
    predict_ids = compiled_predict(model, draw_params(model))
    together = predict_ids(ids_BT, carry)
    row = jax.tree.map(lambda leaf: leaf[2:], (ids_BT, carry))
    assert_close(predict_ids(*row), jax.tree.map(lambda leaf: leaf[2:], together))


def test_scaled_input_is_the_id_divided_by_the_vocabulary_size():
    model = make_model("scaled")
    params, ids_BT = draw_params(model), draw_ids()
    # The same as an embedding of size 1 with the values id / V.
    embed = CharLSTM(V, H, input="embed", embed_size=1)
    table = {"embed": {"embedding": np.arange(V, dtype=np.float32)[:, None] / V}}
    wanted = compiled_predict(embed, params | table)(ids_BT, draw_carry(model))
    assert_close(compiled_predict(model, params)(ids_BT, draw_carry(model)), wanted)


def test_dropout_is_on_in_training_only_and_follows_the_key():
    model, plain = make_model(num_layers=2, dropout_rate=0.5), make_model(num_layers=2)
    params, ids_BT, carry = draw_params(model), draw_ids(), draw_carry(model)
    train = partial(compiled_predict(model, params), ids_BT, carry)
    evaluated = compiled_predict(model, params)(ids_BT, carry)
    assert_close(evaluated, compiled_predict(plain, params)(ids_BT, carry))
    (one, carry_1), (same, _), (other, carry_2) = (
        train(jax.random.key(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1
    assert np.abs(one - evaluated[0]).max() > 0.1
    # Also between the layers: only the second layer reads dropped outputs.
    assert_close(carry_1[0], carry_2[0])
    assert np.abs(carry_1[1][0] - carry_2[1][0]).max() > 0.1


def dropped_HT(variational_dropout):
    """Return which outputs of one layer are dropped in one row, by unit and time step."""
    # With a unit matrix as dense kernel, the logits are the layer's outputs.
    model = CharLSTM(V, V, dropout_rate=0.5, variational_dropout=variational_dropout)
    dense = {"kernel": np.eye(V, dtype=np.float32), "bias": np.zeros(V, np.float32)}
    run = compiled_predict(model, draw_params(model) | {"dense": dense})
    logits_BTV, _ = run(draw_ids(), zero_carry(model, B), jax.random.key(3))
    return np.asarray(logits_BTV[0].T == 0)


def test_variational_dropout_has_one_mask_for_all_time_steps():
    by_step_HT, by_window_HT = dropped_HT(False), dropped_HT(True)
    assert 0 < by_window_HT[:, 0].sum() < V
    np.testing.assert_array_equal(by_window_HT, by_window_HT[:, :1].repeat(T, axis=1))
    assert np.any(by_step_HT != by_step_HT[:, :1])


def test_dropout_keeps_the_mean():
    model = make_model(dropout_rate=0.3)
    params, ids_BT, carry = draw_params(model), draw_ids(), draw_carry(model)
    keys = jax.random.split(jax.random.key(7), 1000)
    # With one layer the logits are linear in what is dropped, so their mean is unbiased.
    train = jax.vmap(lambda key: predict(model, params, ids_BT, carry, key)[0])
    many_BTV = jax.jit(train)(keys)
    deviation_BTV = np.std(many_BTV, axis=0) / np.sqrt(len(keys))
    wanted_BTV, _ = compiled_predict(model, params)(ids_BT, carry)
    assert np.all(np.abs(np.mean(many_BTV, axis=0) - wanted_BTV) < 5 * deviation_BTV)


@pytest.mark.parametrize("recurrence", ["fused", "flax"])
def test_recurrent_dropout_hides_units_from_all_gates(recurrence):
    model = make_model(num_layers=2, recurrence=recurrence, recurrent_dropout=0.4)
    params, ids_BT, carry = draw_params(model), draw_ids(), draw_carry(model)

    def read(h_BH):
        changed = ((carry[0][0], h_BH), carry[1])
        return predict(model, params, ids_BT, changed, jax.random.key(1))[0]

    # Which units of the first layer's h the logits depend on, row by row.
    slopes_BTVBH = jax.jit(jax.jacrev(read))(carry[0][1])
    gated_h_BH = (
        np.stack([np.abs(slopes_BTVBH[row, ..., row, :]).max((0, 1)) for row in range(B)]) > 0
    )
    assert np.all((0 < gated_h_BH.sum(axis=1)) & (gated_h_BH.sum(axis=1) < H))
    assert (gated_h_BH != gated_h_BH[0]).any()  # one mask per row
    # It is off unless training.
    plain = make_model(num_layers=2, recurrence=recurrence)
    evaluated, wanted = (compiled_predict(m, params)(ids_BT, carry) for m in (model, plain))
    assert_close(evaluated, wanted)


def test_hidden_mask_has_the_rate_and_keeps_the_mean():
    mask_BH = hidden_mask(jax.random.key(2), 0.3, (2000, H))
    assert_close(np.unique(mask_BH), np.float32([0, 1 / 0.7]))
    # Five standard errors of a mean of 2,000 draws from 0 and 1 / 0.7, which is 1.
    np.testing.assert_allclose(mask_BH.mean(axis=0), 1, atol=5 * np.sqrt(0.3 / 0.7 / 2000))


@pytest.mark.parametrize("recurrence", ["fused", "flax"])
@pytest.mark.parametrize(
    ("batch_size", "hidden_size", "num_layers"),
    [(B + 1, H, 2), (1, H, 2), (B, H - 1, 2), (B, H, 1)],
)
def test_a_carry_of_another_size_raises(batch_size, hidden_size, num_layers, recurrence):
    model = make_model(num_layers=2, recurrence=recurrence)
    wrong = zero_carry(CharLSTM(V, hidden_size, num_layers), batch_size)
    with pytest.raises(ValueError, match="carry: has the shapes"):
        predict(model, draw_params(model), draw_ids(), wrong)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input", "other"),
        ("recurrence", "other"),
        ("dtype", "float16"),
        ("vocab_size", 0),
        ("hidden_size", 1.5),
        ("num_layers", 0),
        ("embed_size", -1),
        ("num_shards", 0),
        ("dropout_rate", 1.0),
        ("dropout_rate", -0.1),
        ("recurrent_dropout", float("nan")),
        ("norm_epsilon", 0.0),
        ("norm_epsilon", 1e-50),
        ("norm_epsilon", 1e39),
        ("end_id", V),
        ("end_id", -1),
    ],
)
def test_an_invalid_field_raises_with_its_value(field, value):
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}: must be")):
        CharLSTM(**{"vocab_size": V} | {field: value})


def test_dtype_accepts_a_type():
    assert CharLSTM(V, dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("wrong", [V, -1])
def test_an_invalid_id_raises_or_makes_its_row_nan(wrong, kind):
    ids_BT, carry = draw_ids(), draw_carry(kind.model)
    wanted_BTV, _ = kind.predict(ids_BT, carry)
    ids_BT[1, T - 1] = wrong
    with pytest.raises(ValueError, match=f"ids_BT: .*0 to {V - 1}.*{wrong}"):
        predict(kind.model, kind.params, ids_BT, carry)
    # The values of a traced array are unknown when the model is traced.
    found_BTV, _ = kind.predict(ids_BT, carry)
    assert np.all(np.isnan(found_BTV[1]))
    np.testing.assert_array_equal(found_BTV[::2], wanted_BTV[::2])


@pytest.mark.parametrize("ids", [draw_ids()[0], np.float32(draw_ids())], ids=["axes", "type"])
def test_ids_of_other_shapes_or_types_raise(ids):
    model = make_model()
    with pytest.raises(ValueError, match="ids_BT: must"):
        predict(model, draw_params(model), ids, zero_carry(model, B))


def test_zero_carry_is_zeros_for_each_layer():
    carry = zero_carry(make_model(num_layers=2), B)
    assert jax.tree.map(jnp.shape, carry) == (((B, H), (B, H)), ((B, H), (B, H)))
    for leaf_BH in jax.tree.leaves(carry):
        assert leaf_BH.dtype == jnp.float32
        np.testing.assert_array_equal(leaf_BH, np.zeros((B, H)))


@pytest.mark.parametrize(
    ("input", "recurrence"),
    [("one_hot", "fused"), ("scaled", "fused"), ("embed", "flax")],
)
def test_bfloat16_model_returns_float32_close_to_float32_model(input, recurrence):
    model = make_model(input, 2, recurrence)
    params, ids_BT, carry = draw_params(model), draw_ids(), draw_carry(model)
    wanted_BTV, _ = compiled_predict(model, params)(ids_BT, carry)
    rounded = make_model(input, 2, recurrence, dtype="bfloat16")
    logits_BTV, new_carry = compiled_predict(rounded, params)(ids_BT, carry)
    assert {leaf.dtype for leaf in jax.tree.leaves((logits_BTV, new_carry))} == {
        jnp.dtype("float32")
    }
    # bfloat16 keeps 8 bits of logits of up to 3 and of everything before them.
    error = np.abs(logits_BTV - wanted_BTV).max()
    assert 1e-3 < error < 0.1
    arguments = jax.random.key(0), ids_BT, carry
    initial = jax.eval_shape(rounded.init, *arguments)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("is_tied", [False, True])
def test_bfloat16_model_sums_gradients_in_float32(is_tied):
    # A sum in bfloat16 stops growing after some 256 terms of one size. Here there are 4,096, most
    # of the same character.
    rng = np.random.default_rng(0)
    ids_BT = rng.choice(V, size=(64, 65), p=[0.8] + [0.2 / (V - 1)] * (V - 1))
    batch = Batch(ids_BT[:, :-1], ids_BT[:, 1:], np.ones((64, 64), np.float32), np.zeros(64, bool))

    def gradients(dtype):
        model = make_model("embed", dtype=dtype, tie_embeddings=is_tied)
        carry = zero_carry(model, 64)

        def loss(params):
            logits_BTV, _ = predict(model, params, batch.inputs_BT, carry)
            return cross_entropy(logits_BTV, batch).mean()

        # Small weights, so that the gradients of all rows have a sign in common.
        params = jax.tree.map(lambda leaf: leaf / 5, draw_params(model))
        return jax.jit(jax.grad(loss))(params)

    wanted, rounded = gradients("float32"), gradients("bfloat16")
    for leaf, rounded_leaf in zip(*map(jax.tree.leaves, (wanted, rounded)), strict=True):
        # bfloat16 keeps 8 bits, so that activations are off by up to 1/512 in each operation.
        assert np.linalg.norm(rounded_leaf - leaf) < np.linalg.norm(leaf) / 64


@pytest.mark.parametrize(
    "fields",
    [
        {"recurrence": "fused"},
        {
            "recurrence": "flax",
            "input": "embed",
            "multiplicative": True,
            "recurrent_rms_norm": True,
        },
        {"input": "scaled", "end_id": END_ID, "recurrent_rms_norm": True, "dropout_rate": 0.5},
    ],
    ids=["plain", "all parts", "documents"],
)
def test_hidden_states_give_the_logits_and_the_carry(fields):
    model = make_model(num_layers=2, **fields)
    params, ids_BT, carry = draw_params(model), draw_ids(), draw_carry(model)
    ids_BT[1, 2] = END_ID
    layers = jax.tree.map(np.asarray, jax.jit(partial(hidden_states, model, params))(ids_BT, carry))
    logits_BTV, last_carry = compiled_predict(model, params)(ids_BT, carry)
    dense = params["dense"]
    assert_close(layers[-1].h_BTH @ dense["kernel"] + dense["bias"], logits_BTV)
    found = tuple((states.c_BTH[:, -1], states.h_BTH[:, -1]) for states in layers)
    assert_close(found, last_carry)
    for states, (c_BH, _) in zip(layers, carry, strict=True):
        c_before_BTH = np.concatenate([c_BH[:, None], states.c_BTH[:, :-1]], axis=1)
        if model.end_id is not None:
            c_before_BTH = np.where((ids_BT == END_ID)[..., None], 0, c_before_BTH)
        written_BTH = states.input_gate_BTH * states.candidate_BTH
        assert_close(states.c_BTH, states.forget_gate_BTH * c_before_BTH + written_BTH)
        assert_close(states.h_BTH, states.output_gate_BTH * np.tanh(states.c_BTH))
