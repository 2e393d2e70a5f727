"""Promise 1: the scanned Flax cell, its fast twin and a NumPy LSTM agree, forward and gradient."""

import itertools
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import little_optimization
from flax import linen as nn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.experimental import rnn
from jax.test_util import check_grads
from lstm_numpy import GATES, lstm, lstm_gradient

from charlstm.lstm.cudnn import cudnn_lstm
from charlstm.lstm.fused import _chunk_length, add_by_product, add_in_place, fused_lstm
from charlstm.lstm.reference import flax_lstm, init_lstm

# Newer versions of JAX have it here, older ones there.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

LSTMS = {
    "flax": flax_lstm,
    "fused": fused_lstm,
}
# T, B, E and H all differ, so that no two axes can be mixed up unnoticed. Of fewer sums than 4 x 16
# some rows have a mean square so near 0 that dividing by it magnifies float32's rounding.
T, B, E, H = 8, 3, 5, 16
# Sums of a few dozen products; float64 keeps 16 digits, float32 7, and cancelling costs some.
RELATIVE = {"float64": 1e-10, "float32": 1e-5}


each_twin = pytest.mark.parametrize("name", ["flax", "fused"])
# What a layer may have beside the parameters of the Flax cell.
ALL_PARTS = ("scale", "norm")
FORMS = {"all": ALL_PARTS, "plain": ()}
each_kind = pytest.mark.parametrize("kind", ["ids", "vectors"])
# The default recurrence with each kind of input, and the Flax cell with one of them in float64.
each_masked_case = pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [
        ("fused", "ids", "float32"),
        ("fused", "vectors", "float32"),
        ("flax", "vectors", "float64"),
    ],
)


def draw_params(rng, input_size, hidden_size, parts=ALL_PARTS):
    params = {}
    for gate in GATES:
        # About as large as in a trained model: gates neither all open nor all half open.
        into = rng.normal(size=(input_size, hidden_size)) / np.sqrt(input_size)
        back = rng.normal(size=(hidden_size, hidden_size)) / np.sqrt(hidden_size)
        params["i" + gate] = {"kernel": into}
        params["h" + gate] = {"kernel": back, "bias": rng.normal(size=hidden_size)}
    if "scale" in parts:
        kernel = rng.normal(size=(input_size, hidden_size)) / np.sqrt(input_size)
        params["scale"] = {"kernel": kernel}
    if "norm" in parts:
        params["norm"] = {"gain": rng.normal(size=4 * hidden_size)}
    return params


def draw_case(seed, t=T, b=B, e=E, h=H, parts=ALL_PARTS):
    """Return (params, carry, inputs_TBE), and gradients for the carry and the hidden states."""
    rng = np.random.default_rng(seed)
    carry = rng.normal(size=(b, h)), rng.normal(size=(b, h))
    arguments = draw_params(rng, e, h, parts), carry, rng.normal(size=(t, b, e))
    carry_grad = rng.normal(size=(b, h)), rng.normal(size=(b, h))
    return arguments, (carry_grad, rng.normal(size=(t, b, h)))


def draw_ids(seed, t=T, b=B, e=E):
    return np.random.default_rng(seed).integers(e, size=(t, b), dtype=np.int32)


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def singles(tree):
    """Return a tree with all its floats in single precision."""
    return jax.tree.map(lambda leaf: leaf if leaf.dtype == np.int32 else jnp.float32(leaf), tree)


def dot(tree, other):
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), tree, other)))


def assert_close(found, wanted, relative):
    """Compare two trees leaf by leaf, relative to each leaf's largest entry."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    # Moved to NumPy first: each JAX operation on a new shape would be compiled.
    found, wanted = jax.tree.map(np.asarray, (found, wanted))
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        assert leaf.shape == other.shape, path
        worst, largest = np.max(np.abs(leaf - other)), np.max(np.abs(other))
        assert worst <= relative * largest, (jax.tree_util.keystr(path), worst, largest)


def value_and_gradients(name, arguments, gradients, dtype="float32"):
    """Return what a recurrence gives and its gradients for params, carry and float inputs."""
    params, carry, inputs = arguments
    is_ids = inputs.dtype == np.int32

    def run(params, carry, inputs, gradients):
        apply = partial(LSTMS[name], dtype=dtype)
        if is_ids:
            result, pull = jax.vjp(lambda p, c: apply(p, c, inputs), params, carry)
        else:
            result, pull = jax.vjp(apply, params, carry, inputs)
        return result, pull(gradients)

    inputs = jnp.asarray(inputs) if is_ids else cast(inputs, dtype)
    # The default recurrence is compiled with the default options, all others cheaply.
    is_run = (name, dtype) == ("fused", "float32")
    with nullcontext() if is_run else little_optimization():
        return jax.jit(run)(*cast((params, carry), dtype), inputs, cast(gradients, dtype))


def test_numpy_gradient_is_the_slope_of_numpy_forward():
    arguments, gradients = draw_case(0)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), arguments)

    def loss(size):
        moved = jax.tree.map(lambda leaf, d: leaf + size * d, arguments, direction)
        return dot(lstm(*moved), gradients)

    # A central difference is off by size**2 and by float64's rounding divided by size: found so,
    # 1.97e-5 at 1e-4, 1.97e-7 at 1e-5 and 1.8e-9 at 1e-6.
    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    np.testing.assert_allclose(
        dot(lstm_gradient(*arguments, *gradients), direction), slope, rtol=0, atol=1e-8
    )


@pytest.mark.parametrize(
    ("name", "form", "dtype"),
    [
        ("fused", "all", "float32"),
        ("fused", "plain", "float32"),
        ("fused", "all", "float64"),
        ("flax", "all", "float64"),
        ("flax", "plain", "float32"),
    ],
)
def test_forward_and_gradients_equal_numpy(name, form, dtype):
    arguments, gradients = draw_case(2, parts=FORMS[form])
    with enable_x64(dtype == "float64"):
        found = value_and_gradients(name, arguments, gradients, dtype)
        wanted = lstm(*arguments), lstm_gradient(*arguments, *gradients)
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
        assert_close(found, wanted, RELATIVE[dtype])


@pytest.mark.parametrize(
    ("name", "form", "dtype"),
    [
        ("fused", "all", "float32"),
        ("fused", "plain", "float32"),
        ("fused", "all", "float64"),
        ("flax", "plain", "float64"),
    ],
)
def test_ids_stand_for_one_hot_vectors(name, form, dtype):
    (params, carry, _), gradients = draw_case(3, parts=FORMS[form])
    ids_TB = draw_ids(3)
    one_hot_TBE = np.eye(E)[ids_TB]
    with enable_x64(dtype == "float64"):
        found = value_and_gradients(name, (params, carry, ids_TB), gradients, dtype)
        arguments = params, carry, one_hot_TBE
        wanted = lstm(*arguments), lstm_gradient(*arguments, *gradients)[:2]
        assert_close(found, wanted, RELATIVE[dtype])


sizes = {"t": st.integers(1, 9), "b": st.integers(1, 5), "e": st.integers(1, 6)}


@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(
    **sizes,
    h=st.integers(1, 20),
    seed=st.integers(0, 99),
    ids=st.booleans(),
    parts=st.sets(st.sampled_from(ALL_PARTS)),
    name=st.sampled_from(["fused", "flax"]),
)
@example(t=1, b=1, e=1, h=1, seed=0, ids=False, parts=ALL_PARTS, name="fused")
@example(t=1, b=2, e=4, h=13, seed=1, ids=True, parts=(), name="fused")
@example(t=4, b=1, e=3, h=9, seed=2, ids=True, parts=ALL_PARTS, name="flax")
def test_any_shape_equals_numpy(name, t, b, e, h, seed, ids, parts):
    (params, carry, inputs), gradients = draw_case(seed, t, b, e, h, parts)
    dense_TBE = np.eye(e)[draw_ids(seed, t, b, e)] if ids else inputs
    arguments = params, carry, dense_TBE
    value, local_grads = lstm(*arguments), lstm_gradient(*arguments, *gradients)
    with enable_x64(True):
        inputs = draw_ids(seed, t, b, e) if ids else inputs
        found = value_and_gradients(name, (params, carry, inputs), gradients, "float64")
        wanted = value, local_grads[: len(found[1])]
        assert_close(found, wanted, RELATIVE["float64"])


@each_twin
@each_kind
def test_two_half_windows_with_the_carry_handed_on_equal_one(name, kind):
    params, carry, inputs = cast(draw_case(4)[0], "float32")
    if kind == "ids":
        inputs = draw_ids(4)
    apply, inputs = jax.jit(LSTMS[name]), np.asarray(inputs)
    with nullcontext() if name == "fused" else little_optimization():
        whole = apply(params, carry, inputs)
        middle_carry, first_TBH = apply(params, carry, inputs[: T // 2])
        last_carry, second_TBH = apply(params, middle_carry, inputs[T // 2 :])
    assert_close((last_carry, np.concatenate([first_TBH, second_TBH])), whole, 1e-6)


# Where a row begins anew: never, at once, in the middle, twice in a row, at the end.
STARTS_BT = [(), (0,), (3,), (0, 4, 5), (T - 1,)]


def numpy_with_starts(params, carry, inputs_TBE, gradients):
    """Return what lstm and lstm_gradient do for rows that begin anew: each piece is run alone."""
    (dc_BH, dh_BH), hidden_grad_TBH = gradients
    params_grad = jax.tree.map(np.zeros_like, params)
    last, first_grad = np.zeros((2, *carry[0].shape)), np.zeros((2, *carry[0].shape))
    hidden_TBH, inputs_grad_TBE = np.zeros_like(hidden_grad_TBH), np.zeros_like(inputs_TBE)
    for row, starts in enumerate(STARTS_BT):
        bounds = sorted({0, *starts, T})
        for begin, end in itertools.pairwise(bounds):
            piece = slice(begin, end), slice(row, row + 1)
            is_begun, is_last = begin in starts, end == T
            state = tuple(leaf[row : row + 1] * (not is_begun) for leaf in carry)
            state_grad = tuple(leaf[row : row + 1] * is_last for leaf in (dc_BH, dh_BH))
            assert is_begun or begin == 0
            arguments = params, state, inputs_TBE[piece]
            state, hidden_TBH[piece] = lstm(*arguments)
            grads = lstm_gradient(*arguments, state_grad, hidden_grad_TBH[piece])
            params_grad = jax.tree.map(np.add, params_grad, grads[0])
            inputs_grad_TBE[piece] = grads[2]
            if is_last:
                last[:, row] = np.concatenate(state)
            if not is_begun:
                first_grad[:, row] = np.concatenate(grads[1])
    return (tuple(last), hidden_TBH), (params_grad, tuple(first_grad), inputs_grad_TBE)


@each_masked_case
def test_a_row_that_begins_anew_is_run_and_differentiated_as_if_alone(
    name, kind, dtype, monkeypatch
):
    b = len(STARTS_BT)
    (params, carry, inputs), gradients = draw_case(22, b=b)
    if kind == "ids":
        inputs = draw_ids(22, b=b)
    keep_TB = np.ones((T, b), bool)
    for row, starts in enumerate(STARTS_BT):
        keep_TB[list(starts), row] = False
    monkeypatch.setitem(LSTMS, name, partial(LSTMS[name], keep_TB=keep_TB))
    with enable_x64(dtype == "float64"):
        found = value_and_gradients(name, (params, carry, inputs), gradients, dtype)
        inputs_TBE = np.eye(E)[inputs] if kind == "ids" else inputs
        value, local_grads = numpy_with_starts(params, carry, inputs_TBE, gradients)
        assert_close(found, (value, local_grads[: len(found[1])]), RELATIVE[dtype])


@each_masked_case
def test_a_mask_of_the_hidden_state_is_what_its_gates_see(name, kind, dtype, monkeypatch):
    (params, carry, inputs), gradients = draw_case(24)
    if kind == "ids":
        inputs = draw_ids(24)
    mask_BH = np.random.default_rng(24).integers(0, 3, (B, H)) / 2
    monkeypatch.setitem(LSTMS, name, partial(LSTMS[name], mask_BH=mask_BH))
    with enable_x64(dtype == "float64"):
        found = value_and_gradients(name, (params, carry, inputs), gradients, dtype)
        arguments = params, carry, np.eye(E)[inputs] if kind == "ids" else inputs
        value, local_grads = (
            lstm(*arguments, mask_BH),
            lstm_gradient(*arguments, *gradients, mask_BH),
        )
        assert_close(found, (value, local_grads[: len(found[1])]), RELATIVE[dtype])


def test_without_masks_the_program_has_no_trace_of_them():
    params, carry, inputs_TBE = singles(draw_case(23)[0])

    def size(**masks):
        loss = lambda *arguments: fused_lstm(*arguments, **masks)[1].sum()  # noqa: E731
        program = str(jax.make_jaxpr(jax.grad(loss))(params, carry, inputs_TBE))
        return program.count("select_n"), program.count(" mul ")

    plain = size(keep_TB=None, mask_BH=None)
    assert plain[0] == 0
    assert size(keep_TB=np.ones((T, B), bool))[0] > 0
    # In the forward pass, in the backward pass and in the gradient of the kernels.
    assert size(mask_BH=np.ones((B, H), np.float32)) == (0, plain[1] + 3)


def fused_loss(params, carry, inputs, gradients):
    """Return a scalar that all results enter, each entry with its own weight."""
    return dot(fused_lstm(params, carry, inputs), gradients)


def numpy_grads(params, carry, inputs, gradients):
    """Return what jax.grad(fused_loss, argnums=(0, 1)) should give."""
    inputs_TBE = np.eye(E)[inputs] if inputs.dtype == np.int32 else inputs
    return lstm_gradient(params, carry, inputs_TBE, *gradients)[:2]


@each_kind
def test_fused_gradients_of_batches_so_large_that_time_is_cut_into_chunks(kind):
    # 512 rows a step: chunks of 2 of the 6 steps. Smaller batches make one chunk of all steps.
    assert [_chunk_length(6, 512), _chunk_length(7, 512), _chunk_length(T, B)] == [2, 7, T]
    (params, carry, inputs), gradients = draw_case(18, t=6, b=512, h=32)
    if kind == "ids":
        inputs = draw_ids(18, t=6, b=512)
    found = value_and_gradients("fused", (params, carry, inputs), gradients)[1]
    dense_TBE = np.eye(E)[inputs] if kind == "ids" else inputs
    wanted = lstm_gradient(params, carry, dense_TBE, *gradients)
    assert_close(found, wanted[: len(found)], 1e-5)


def test_adding_to_rows_by_a_product_gives_what_adding_in_place_gives():
    # The product is what GPUs and TPUs run, the other what CPUs run.
    rng = np.random.default_rng(19)
    rows_EG, values_TBG = rng.normal(size=(E, 4)), rng.normal(size=(T, B, 4))
    ids = draw_ids(19)
    wanted = rows_EG.copy()
    np.add.at(wanted, ids, values_TBG)
    for add in (add_in_place, add_by_product):
        assert_close(add(*singles((rows_EG, ids, values_TBG))), np.float32(wanted), 1e-5)


@pytest.fixture
def cudnn_on_cpu(monkeypatch):
    """Put JAX's reference of cuDNN's LSTM, which unpacks the same vector, in its place."""

    def lstm_on_cpu(x, h_0, c_0, weights, seq_lengths, **sizes):
        layout = {name: size for name, size in sizes.items() if name != "dropout"}
        kernels_and_biases = rnn.unpack_lstm_weights(weights, **layout)
        # By position, since these sizes are static there.
        return rnn.lstm_ref(x, h_0, c_0, *kernels_and_biases, seq_lengths, *sizes.values())

    monkeypatch.setattr(rnn, "lstm", lstm_on_cpu)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@each_kind
def test_what_cudnn_is_given_means_the_same_lstm(kind, cudnn_on_cpu):
    (params, carry, inputs), gradients = draw_case(20, parts=())
    if kind == "ids":
        inputs = draw_ids(20)
    wanted = lstm(params, carry, np.eye(E)[inputs] if kind == "ids" else inputs)

    @jax.jit
    def run(params, carry, inputs, gradients):
        result, pull = jax.vjp(lambda p, c: cudnn_lstm(p, c, inputs), params, carry)
        return result, pull(gradients)

    with little_optimization():
        found = run(*singles((params, carry, inputs, gradients)))
    assert_close(found, (wanted, numpy_grads(params, carry, inputs, gradients)), 1e-5)


@pytest.mark.parametrize(("dtype", "message"), [("float32", "NVIDIA"), ("bfloat16", "float32")])
def test_cudnn_says_what_it_needs(dtype, message):
    with pytest.raises(ValueError, match=message):
        cudnn_lstm(*singles(draw_case(21, parts=())[0]), dtype=dtype)


def test_cudnn_refuses_a_mask_of_the_hidden_state(cudnn_on_cpu):
    with pytest.raises(ValueError, match="mask_BH: cuDNN"):
        cudnn_lstm(*singles(draw_case(21, parts=())[0]), mask_BH=np.ones((B, H)))


def test_cudnn_refuses_rows_that_begin_anew(cudnn_on_cpu):
    with pytest.raises(ValueError, match="begins anew"):
        cudnn_lstm(*singles(draw_case(21, parts=())[0]), keep_TB=np.ones((T, B), bool))


@pytest.mark.parametrize(("part", "message"), [("scale", "does not scale"), ("norm", "normalise")])
def test_cudnn_refuses_what_it_does_not_have(part, message, cudnn_on_cpu):
    with pytest.raises(ValueError, match=message):
        cudnn_lstm(*singles(draw_case(21, parts=(part,))[0]))


@each_kind
def test_fused_maps_over_parameters_and_batches_as_over_each_alone(kind):
    many = [draw_params(np.random.default_rng(seed), E, H) for seed in (6, 7)]
    rests = []
    # With case 8 and parameters 6, a mean square near 0 magnifies rounding above the tolerance.
    for seed in (5, 9):
        (_, carry, inputs), gradients = draw_case(seed)
        rests.append((carry, draw_ids(seed) if kind == "ids" else inputs, gradients))
    stacked, stacked_rests = (
        jax.tree.map(lambda *leaves: np.stack(leaves), *trees) for trees in (many, rests)
    )
    over_batches = jax.vmap(jax.grad(fused_loss, argnums=(0, 1)), in_axes=(None, 0, 0, 0))
    over_both = jax.vmap(over_batches, in_axes=(0, None, None, None))
    found = jax.tree.map(np.asarray, jax.jit(over_both)(*singles((stacked, *stacked_rests))))
    for (i, params), (j, rest) in itertools.product(enumerate(many), enumerate(rests)):
        one = jax.tree.map(lambda leaf, i=i, j=j: leaf[i, j], found)
        assert_close(one, numpy_grads(params, *rest), 1e-5)


def test_fused_has_the_same_gradients_under_checkpoint():
    (params, carry, _), gradients = draw_case(10)
    arguments = params, carry, draw_ids(10), gradients
    grads = jax.jit(jax.grad(jax.checkpoint(fused_loss), argnums=(0, 1)))
    assert_close(grads(*singles(arguments)), numpy_grads(*arguments), 1e-5)


def test_fused_gradients_pass_the_check_by_finite_differences():
    with enable_x64(True), little_optimization():
        arguments = cast(draw_case(11)[0], "float64")
        # Central differences, off by 6e-5 at JAX's own size, 1e-4, and by its square.
        run = jax.jit(partial(fused_lstm, dtype="float64"))
        check_grads(run, arguments, order=1, modes=["rev"], eps=1e-5)


def test_fused_has_no_forward_mode_but_the_flax_cell_has():
    (params, carry, inputs), gradients = draw_case(12)
    direction = draw_params(np.random.default_rng(13), E, H)
    _, carry32, inputs32 = singles((params, carry, inputs))
    primals, tangents = (singles(params),), (singles(direction),)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda p: fused_lstm(p, carry32, inputs32), primals, tangents)
    run_flax = partial(jax.jvp, lambda p: flax_lstm(p, carry32, inputs32))
    with little_optimization():
        _, moved = jax.tree.map(np.asarray, jax.jit(run_flax)(primals, tangents))
    # The same number both ways: <gradients, J direction> = <J' gradients, direction>.
    params_grad = lstm_gradient(params, carry, inputs, *gradients)[0]
    np.testing.assert_allclose(dot(moved, gradients), dot(params_grad, direction), rtol=1e-4)


@pytest.mark.parametrize(("kind", "mode"), [("ids", "reverse"), ("vectors", "forward")])
def test_second_derivatives_of_fused_are_those_of_the_flax_cell(kind, mode):
    (params, carry, inputs), (carry_grad, hidden_grad) = draw_case(14, t=3, h=4)
    direction = draw_params(np.random.default_rng(15), E, 4)

    given = draw_ids(16, t=3) if kind == "ids" else inputs

    def loss(name, params):
        found = LSTMS[name](params, cast(carry, "float64"), jnp.asarray(given), dtype="float64")
        # Squared, so that the second derivatives of the last operation count as well.
        return dot(jax.tree.map(jnp.square, found), (carry_grad, hidden_grad))

    def hessian_product(name, mode, at, towards):
        grad = jax.grad(partial(loss, name))
        if mode == "forward":
            return jax.jvp(grad, (at,), (towards,))[1]
        return jax.grad(lambda params: dot(grad(params), towards))(at)

    with enable_x64(True), little_optimization():
        run = jax.jit(hessian_product, static_argnums=(0, 1))
        arguments = cast((params, direction), "float64")
        found = run("fused", mode, *arguments)
        wanted = run("flax", "forward", *arguments)
    assert_close(found, wanted, RELATIVE["float64"])


@pytest.mark.parametrize(
    ("name", "kind"), [("fused", "ids"), ("fused", "vectors"), ("flax", "ids")]
)
def test_bfloat16_stays_near_float32_and_keeps_carry_and_gradients_in_float32(name, kind):
    (params, carry, inputs), gradients = draw_case(15)
    inputs_TBE = inputs
    if kind == "ids":
        inputs = draw_ids(15)
        inputs_TBE = np.eye(E)[inputs]
    wanted_carry, wanted_TBH = lstm(params, carry, inputs_TBE)
    wanted_grads = lstm_gradient(params, carry, inputs_TBE, *gradients)[:2]

    @jax.jit
    def run(params, carry, inputs, gradients):
        apply = partial(LSTMS[name], dtype=jnp.bfloat16)
        result, pull = jax.vjp(lambda p, c: apply(p, c, inputs), params, carry)
        return result, pull(gradients)

    with little_optimization():
        found = run(*singles((params, carry, inputs, gradients)))
    (last_carry, hidden_TBH), grads = jax.tree.map(np.asarray, found)
    # bfloat16 keeps 8 bits: gates are off by 1/256 or so, at each of 8 steps.
    np.testing.assert_allclose(hidden_TBH, wanted_TBH, atol=0.03)
    for found, wanted in zip(last_carry, wanted_carry, strict=True):
        np.testing.assert_allclose(found, wanted, atol=0.03 * np.max(np.abs(wanted)))
    # And it is bfloat16: float32 would be a hundred times nearer.
    assert np.max(np.abs(hidden_TBH - wanted_TBH)) > 3e-4
    results = jax.tree.leaves((last_carry, hidden_TBH, grads))
    assert {leaf.dtype for leaf in results} == {jnp.dtype("float32")}
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    assert_close(grads, wanted_grads, 0.1)


@each_twin
def test_bfloat16_does_not_round_what_the_cell_remembers(name):
    # Gates that forget nothing and add 1/1000 a step, which is less than bfloat16 sees beside 1.
    params = jax.tree.map(lambda leaf: np.zeros_like(leaf, np.float32), draw_case(17)[0][0])
    for gate, bias in {"i": np.log(1e-3), "f": 20.0, "g": 20.0}.items():
        params["h" + gate]["bias"] += bias
    carry = np.ones((B, H), np.float32), np.zeros((B, H), np.float32)
    inputs_TBE = np.zeros((200, B, E), np.float32)
    with little_optimization():
        run = jax.jit(partial(LSTMS[name], dtype=jnp.bfloat16))
        (c_BH, _), _ = run(params, carry, inputs_TBE)
    # 1.2 but for the gate itself, which bfloat16 rounds by up to 2 %.
    np.testing.assert_allclose(c_BH, np.full((B, H), 1.2), atol=0.01)


INITIAL_E, INITIAL_H = 40, 33


def draw_initial(seed=0, **parts):
    with little_optimization():
        params = init_lstm(jax.random.key(seed), INITIAL_E, INITIAL_H, **parts)
        return jax.tree.map(np.asarray, params)


@pytest.fixture(scope="module")
def initial():
    return draw_initial()


def concat_gates(params, side):
    return np.concatenate([params[side + gate]["kernel"] for gate in GATES], axis=1)


def test_initial_biases_are_1_for_the_forget_gate_and_0_for_the_others(initial):
    for gate in GATES:
        wanted_H = np.full(INITIAL_H, 1.0 if gate == "f" else 0.0)
        np.testing.assert_array_equal(initial["h" + gate]["bias"], wanted_H)


def test_initial_recurrent_kernels_side_by_side_have_orthonormal_rows(initial):
    kernel_HG = concat_gates(initial, "h")
    np.testing.assert_allclose(kernel_HG @ kernel_HG.T, np.eye(INITIAL_H), atol=1e-5)
    # Not just a unit matrix and zeros: every gate takes part.
    assert all(np.abs(block).max() > 0.1 for block in np.split(kernel_HG, 4, axis=1))


def test_initial_input_kernel_is_glorot_uniform_over_all_four_gates(initial):
    kernel_EG = concat_gates(initial, "i")
    bound = np.sqrt(6 / (INITIAL_E + 4 * INITIAL_H))
    assert 0.99 * bound < np.max(np.abs(kernel_EG)) <= bound
    # The variance of n uniform numbers is off by a share of sqrt(0.8 / n); five times that.
    five_deviations = 5 * np.sqrt(0.8 / kernel_EG.size)
    np.testing.assert_allclose(np.var(kernel_EG), bound**2 / 3, rtol=five_deviations)


def test_initial_parameters_follow_the_key(initial):
    same, other = draw_initial(seed=0), draw_initial(seed=1)
    jax.tree.map(np.testing.assert_array_equal, same, initial)
    for name in ("ii", "io", "hi", "ho"):
        assert np.abs(other[name]["kernel"] - initial[name]["kernel"]).max() > 0.01


def test_initial_scales_are_1_so_that_the_layer_begins_as_a_plain_one(initial):
    scaled = draw_initial(multiplicative=True, recurrent_rms_norm=True)
    np.testing.assert_array_equal(scaled.pop("scale")["kernel"], np.zeros((INITIAL_E, INITIAL_H)))
    np.testing.assert_array_equal(scaled.pop("norm")["gain"], np.ones(4 * INITIAL_H))
    jax.tree.map(np.testing.assert_array_equal, scaled, initial)


def test_initial_tree_is_that_of_the_flax_cell(initial):
    cell = nn.OptimizedLSTMCell
    key, inputs_BE = jax.random.key(0), jnp.zeros((B, INITIAL_E))
    carry = (jnp.zeros((B, INITIAL_H)),) * 2
    wanted = jax.eval_shape(cell(features=INITIAL_H).init, key, carry, inputs_BE)["params"]
    assert jax.tree.structure(initial) == jax.tree.structure(wanted)
    assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
