"""The recurrences agree with a NumPy LSTM, forward and gradients."""

import itertools
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import little_optimization
from flax import linen as nn
from helpers import FLOAT32, FLOAT64, SUM_ORDER, assert_close, assert_equal
from jax.experimental import rnn
from lstm_numpy import (
    ALL_PARTS,
    GATES,
    B,
    E,
    H,
    T,
    draw_case,
    draw_ids,
    draw_params,
    lstm,
    lstm_gradient,
    singles,
)

from charlstm.lstm.backward import _chunk_length, add_by_product, add_in_place
from charlstm.lstm.cudnn import cudnn_lstm
from charlstm.lstm.fused import fused_lstm
from charlstm.lstm.native import native_lstm
from charlstm.lstm.reference import flax_lstm, init_lstm

# Newer versions of JAX have it here, older ones there.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

LSTMS = {
    "flax": flax_lstm,
    "fused": fused_lstm,
    "native": native_lstm,
    "accelerator": fused_lstm,  # the program for other platforms, run on a CPU
}
RELATIVE = {"float64": FLOAT64, "float32": FLOAT32}


@pytest.fixture(autouse=True)
def _load_native(request):
    if "native" in request.node.name:
        request.getfixturevalue("native_library")


@pytest.fixture(autouse=True)
def _lower_as_for_accelerators(request, monkeypatch):
    if "accelerator" in request.node.name:
        choose = lambda *given, cpu, default: default(*given)  # noqa: E731
        monkeypatch.setattr(jax.lax, "platform_dependent", choose)


each_recurrence = pytest.mark.parametrize("name", ["flax", "fused"])
FORMS = {"all": ALL_PARTS, "plain": ()}
each_kind = pytest.mark.parametrize("kind", ["ids", "vectors"])


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def dot(tree, other):
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), tree, other)))


def value_and_gradients(name, arguments, gradients, dtype="float32"):
    """Return the result of a recurrence and its gradients for params, carry and float inputs."""
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
    # The default recurrence is compiled as for users, the others with little optimization.
    is_default = (name, dtype) == ("fused", "float32")
    with nullcontext() if is_default else little_optimization():
        return jax.jit(run)(*cast((params, carry), dtype), inputs, cast(gradients, dtype))


def test_numpy_gradient_matches_finite_differences():
    arguments, gradients = draw_case(0)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), arguments)

    def loss(size):
        moved = jax.tree.map(lambda leaf, d: leaf + size * d, arguments, direction)
        return dot(lstm(*moved), gradients)

    # The error of a central difference is of the order of size**2 + 1e-16 / size.
    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    np.testing.assert_allclose(
        dot(lstm_gradient(*arguments, *gradients), direction), slope, rtol=0, atol=1e-8
    )


@pytest.mark.parametrize(
    ("name", "form", "dtype"),
    [
        ("fused", "all", "float32"),
        ("fused", "plain", "float32"),
        ("native", "all", "float32"),
        ("native", "plain", "float32"),
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
        ("native", "all", "float32"),
        ("native", "plain", "float32"),
    ],
)
def test_ids_match_one_hot_vectors_in_numpy(name, form, dtype):
    (params, carry, _), gradients = draw_case(3, parts=FORMS[form])
    ids_TB = draw_ids(3)
    one_hot_TBE = np.eye(E)[ids_TB]
    with enable_x64(dtype == "float64"):
        found = value_and_gradients(name, (params, carry, ids_TB), gradients, dtype)
        arguments = params, carry, one_hot_TBE
        wanted = lstm(*arguments), lstm_gradient(*arguments, *gradients)[:2]
        assert_close(found, wanted, RELATIVE[dtype])


@pytest.mark.parametrize(
    ("name", "shape", "ids", "parts"),
    [
        ("fused", (1, 1, 1, 1), False, ALL_PARTS),
        ("fused", (1, 2, 4, 13), True, ()),
        ("fused", (9, 5, 6, 20), False, ("scale",)),
        ("fused", (3, 4, 2, 7), True, ("norm",)),
        ("flax", (4, 1, 3, 9), True, ALL_PARTS),
    ],
)
def test_any_shape_equals_numpy(name, shape, ids, parts):
    (params, carry, inputs), gradients = draw_case(1, *shape, parts)
    t, b, e, _ = shape
    dense_TBE = np.eye(e)[draw_ids(1, t, b, e)] if ids else inputs
    arguments = params, carry, dense_TBE
    value, local_grads = lstm(*arguments), lstm_gradient(*arguments, *gradients)
    with enable_x64(True):
        inputs = draw_ids(1, t, b, e) if ids else inputs
        found = value_and_gradients(name, (params, carry, inputs), gradients, "float64")
        wanted = value, local_grads[: len(found[1])]
        assert_close(found, wanted, RELATIVE["float64"])


def test_fused_half_windows_with_the_carry_match_the_window():
    params, carry, _ = cast(draw_case(4)[0], "float32")
    apply, inputs = jax.jit(fused_lstm), draw_ids(4)
    whole = apply(params, carry, inputs)
    middle_carry, first_TBH = apply(params, carry, inputs[: T // 2])
    last_carry, second_TBH = apply(params, middle_carry, inputs[T // 2 :])
    assert_close((last_carry, np.concatenate([first_TBH, second_TBH])), whole, SUM_ORDER)


# Time steps at which a row is reset: none, the first, a middle one, two in a row, the last.
RESETS = [(), (0,), (3,), (0, 4, 5), (T - 1,)]


def numpy_with_resets(params, carry, inputs_TBE, gradients, mask_BH):
    """Return results and gradients of rows with resets, by a separate run of each piece."""
    (dc_BH, dh_BH), hidden_grad_TBH = gradients
    params_grad = jax.tree.map(np.zeros_like, params)
    last, first_grad = np.zeros((2, *carry[0].shape)), np.zeros((2, *carry[0].shape))
    hidden_TBH, inputs_grad_TBE = np.zeros_like(hidden_grad_TBH), np.zeros_like(inputs_TBE)
    for row, resets in enumerate(RESETS):
        only = slice(row, row + 1)
        for begin, end in itertools.pairwise(sorted({0, *resets, T})):
            piece = slice(begin, end), only
            is_reset, is_last = begin in resets, end == T
            state = tuple(leaf[only] * (not is_reset) for leaf in carry)
            state_grad = tuple(leaf[only] * is_last for leaf in (dc_BH, dh_BH))
            arguments = params, state, inputs_TBE[piece]
            state, hidden_TBH[piece] = lstm(*arguments, mask_BH[only])
            grads = lstm_gradient(*arguments, state_grad, hidden_grad_TBH[piece], mask_BH[only])
            params_grad = jax.tree.map(np.add, params_grad, grads[0])
            inputs_grad_TBE[piece] = grads[2]
            if is_last:
                last[:, row] = np.concatenate(state)
            if not is_reset:
                first_grad[:, row] = np.concatenate(grads[1])
    return (tuple(last), hidden_TBH), (params_grad, tuple(first_grad), inputs_grad_TBE)


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "with_mask"),
    [
        ("fused", "ids", "float32", True),
        ("fused", "vectors", "float32", True),
        ("accelerator", "ids", "float32", True),
        ("accelerator", "vectors", "float32", True),
        ("native", "ids", "float32", True),
        ("native", "vectors", "float32", False),
        ("flax", "vectors", "float64", True),
    ],
)
def test_resets_match_separate_runs_in_numpy(name, kind, dtype, with_mask, monkeypatch):
    b = len(RESETS)
    (params, carry, inputs), gradients = draw_case(22, b=b)
    if kind == "ids":
        inputs = draw_ids(22, b=b)
    masks = {"keep_TB": np.ones((T, b), bool)}
    for row, resets in enumerate(RESETS):
        masks["keep_TB"][list(resets), row] = False
    mask_BH = np.ones((b, H))
    if with_mask:
        masks["mask_BH"] = mask_BH = draw_mask(b)
    monkeypatch.setitem(LSTMS, name, partial(LSTMS[name], **masks))
    with enable_x64(dtype == "float64"):
        found = value_and_gradients(name, (params, carry, inputs), gradients, dtype)
        inputs_TBE = np.eye(E)[inputs] if kind == "ids" else inputs
        value, grads = numpy_with_resets(params, carry, inputs_TBE, gradients, mask_BH)
        assert_close(found, (value, grads[: len(found[1])]), RELATIVE[dtype])


def draw_mask(b):
    return np.random.default_rng(24).integers(0, 3, (b, H)) / 2


def test_absent_masks_add_no_operations(monkeypatch):
    # The program has a backward pass for CPUs and one for other platforms. Count the first.
    choose = lambda *given, cpu, default: cpu(*given)  # noqa: E731
    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    params, carry, inputs_TBE = singles(draw_case(23)[0])

    def size(**masks):
        loss = lambda *arguments: fused_lstm(*arguments, **masks)[1].sum()  # noqa: E731
        program = str(jax.make_jaxpr(jax.grad(loss))(params, carry, inputs_TBE))
        return program.count("select_n"), program.count(" mul ")

    plain = size(keep_TB=None, mask_BH=None)
    assert plain[0] == 0
    assert size(keep_TB=np.ones((T, B), bool))[0] > 0
    # One product each in the forward pass, the backward pass and the kernels' gradient.
    assert size(mask_BH=np.ones((B, H), np.float32)) == (0, plain[1] + 3)


def fused_loss(params, carry, inputs, gradients):
    """Return the sum of all results, each entry with its own weight."""
    return dot(fused_lstm(params, carry, inputs), gradients)


def numpy_grads(params, carry, inputs, gradients):
    """Return the oracle of jax.grad(fused_loss, argnums=(0, 1))."""
    inputs_TBE = np.eye(E)[inputs] if inputs.dtype == np.int32 else inputs
    return lstm_gradient(params, carry, inputs_TBE, *gradients)[:2]


@pytest.mark.parametrize(("name", "num_steps"), [("fused", 6), ("accelerator", 16)])
def test_gradients_over_several_chunks_match_numpy(name, num_steps):
    # 512 rows per step make chunks of 2 steps on a CPU and of 8 elsewhere.
    arguments, gradients = draw_case(18, t=num_steps, b=512, h=8)
    found = value_and_gradients(name, arguments, gradients)[1]
    assert_close(found, lstm_gradient(*arguments, *gradients))


def test_chunk_length_divides_the_window():
    # A smaller batch makes one chunk, and so does a window without a divisor.
    shapes = (6, 512, 1024), (16, 512, 4096), (7, 512, 1024), (T, B, 1024)
    assert [_chunk_length(*shape) for shape in shapes] == [2, 8, 7, T]


def test_add_by_product_matches_add_in_place():
    # GPUs and TPUs run the product, CPUs the other.
    rng = np.random.default_rng(19)
    rows_EG, values_TBG = rng.normal(size=(E, 4)), rng.normal(size=(T, B, 4))
    ids = draw_ids(19)
    wanted = rows_EG.copy()
    np.add.at(wanted, ids, values_TBG)
    for add in (add_in_place, add_by_product):
        assert_close(add(*singles((rows_EG, ids, values_TBG))), np.float32(wanted))


@pytest.fixture
def cudnn_on_cpu(monkeypatch):
    """Replace cuDNN's LSTM by JAX's reference of it, which unpacks the same vector."""

    def lstm_on_cpu(x, h_0, c_0, weights, seq_lengths, **sizes):
        layout = {name: size for name, size in sizes.items() if name != "dropout"}
        kernels_and_biases = rnn.unpack_lstm_weights(weights, **layout)
        # By position: these arguments of lstm_ref are static.
        return rnn.lstm_ref(x, h_0, c_0, *kernels_and_biases, seq_lengths, *sizes.values())

    monkeypatch.setattr(rnn, "lstm", lstm_on_cpu)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@each_kind
def test_packed_weights_of_cudnn_match_numpy(kind, cudnn_on_cpu):
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
    assert_close(found, (wanted, numpy_grads(params, carry, inputs, gradients)))


@pytest.mark.parametrize(("dtype", "message"), [("float32", "NVIDIA"), ("bfloat16", "float32")])
def test_cudnn_requires_a_gpu_and_float32(dtype, message):
    with pytest.raises(ValueError, match=message):
        cudnn_lstm(*singles(draw_case(21, parts=())[0]), dtype=dtype)


def test_cudnn_refuses_a_hidden_mask(cudnn_on_cpu):
    with pytest.raises(ValueError, match="mask_BH: cuDNN"):
        cudnn_lstm(*singles(draw_case(21, parts=())[0]), mask_BH=np.ones((B, H)))


def test_cudnn_refuses_resets(cudnn_on_cpu):
    with pytest.raises(ValueError, match="keep_TB: cuDNN"):
        cudnn_lstm(*singles(draw_case(21, parts=())[0]), keep_TB=np.ones((T, B), bool))


@pytest.mark.parametrize("part", ["scale", "norm"])
def test_cudnn_refuses_optional_parts(part, cudnn_on_cpu):
    with pytest.raises(ValueError, match=f"{part}: cuDNN"):
        cudnn_lstm(*singles(draw_case(21, parts=(part,))[0]))


def test_fused_gradients_under_vmap_match_numpy():
    many = [draw_params(np.random.default_rng(seed), E, H) for seed in (6, 7)]
    rests = []
    # With case 8 and parameters 6, a mean square near 0 magnifies rounding above the tolerance.
    for seed in (5, 9):
        (_, carry, _), gradients = draw_case(seed)
        rests.append((carry, draw_ids(seed), gradients))
    stacked, stacked_rests = (
        jax.tree.map(lambda *leaves: np.stack(leaves), *trees) for trees in (many, rests)
    )
    over_batches = jax.vmap(jax.grad(fused_loss, argnums=(0, 1)), in_axes=(None, 0, 0, 0))
    over_both = jax.vmap(over_batches, in_axes=(0, None, None, None))
    with little_optimization():
        found = jax.jit(over_both)(*singles((stacked, *stacked_rests)))
    found = jax.tree.map(np.asarray, found)
    for (i, params), (j, rest) in itertools.product(enumerate(many), enumerate(rests)):
        one = jax.tree.map(lambda leaf, i=i, j=j: leaf[i, j], found)
        assert_close(one, numpy_grads(params, *rest))


def test_fused_gradients_under_checkpoint_match_numpy():
    (params, carry, _), gradients = draw_case(10)
    arguments = params, carry, draw_ids(10), gradients
    grads = jax.jit(jax.grad(jax.checkpoint(fused_loss), argnums=(0, 1)))
    with little_optimization():
        found = grads(*singles(arguments))
    assert_close(found, numpy_grads(*arguments))


def test_forward_mode_works_with_flax_and_raises_with_fused():
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


def test_second_derivatives_of_fused_match_flax():
    (params, carry, inputs), (carry_grad, hidden_grad) = draw_case(14, t=3, h=4)
    direction = draw_params(np.random.default_rng(15), E, 4)

    def loss(name, params):
        found = LSTMS[name](params, cast(carry, "float64"), jnp.asarray(inputs), dtype="float64")
        # Squared, to include the second derivative of the last operation.
        return dot(jax.tree.map(jnp.square, found), (carry_grad, hidden_grad))

    def hessian_product(name, mode, at, towards):
        grad = jax.grad(partial(loss, name))
        if mode == "forward":
            return jax.jvp(grad, (at,), (towards,))[1]
        return jax.grad(lambda params: dot(grad(params), towards))(at)

    with enable_x64(True), little_optimization():
        run = jax.jit(hessian_product, static_argnums=(0, 1))
        arguments = cast((params, direction), "float64")
        wanted = run("flax", "forward", *arguments)
        for mode in ("forward", "reverse"):
            assert_close(run("fused", mode, *arguments), wanted, RELATIVE["float64"])


@pytest.mark.parametrize(
    ("name", "kind"), [("fused", "ids"), ("accelerator", "vectors"), ("flax", "vectors")]
)
def test_bfloat16_is_close_to_numpy_with_float32_results(name, kind):
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
    # bfloat16 keeps 8 bits: gates are off by about 1/256 at each of 8 steps.
    np.testing.assert_allclose(hidden_TBH, wanted_TBH, atol=0.03)
    for found, wanted in zip(last_carry, wanted_carry, strict=True):
        np.testing.assert_allclose(found, wanted, atol=0.03 * np.max(np.abs(wanted)))
    # Computations in float32 would be a hundred times closer.
    assert np.max(np.abs(hidden_TBH - wanted_TBH)) > 3e-4
    results = jax.tree.leaves((last_carry, hidden_TBH, grads))
    assert {leaf.dtype for leaf in results} == {jnp.dtype("float32")}
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    assert_close(grads, wanted_grads, 0.1)


@each_recurrence
def test_bfloat16_does_not_round_the_cell_state(name):
    # The gates forget nothing and add 1/1000 per step, which rounding to bfloat16 would lose.
    params = jax.tree.map(lambda leaf: np.zeros_like(leaf, np.float32), draw_case(17)[0][0])
    for gate, bias in {"i": np.log(1e-3), "f": 20.0, "g": 20.0}.items():
        params["h" + gate]["bias"] += bias
    carry = np.ones((B, H), np.float32), np.zeros((B, H), np.float32)
    inputs_TBE = np.zeros((200, B, E), np.float32)
    with little_optimization():
        run = jax.jit(partial(LSTMS[name], dtype=jnp.bfloat16))
        (c_BH, _), _ = run(params, carry, inputs_TBE)
    # 1.2 up to the rounding of the input gate, 2 % of 0.2.
    np.testing.assert_allclose(c_BH, np.full((B, H), 1.2), atol=0.01)


@pytest.mark.parametrize("parts", [(), ALL_PARTS])
def test_bfloat16_does_not_round_the_forget_gate(parts):
    # bfloat16 rounds this gate to 1, whose gradient does not decay.
    forget, num_steps = 0.999, 200
    params = jax.tree.map(
        lambda leaf: np.zeros_like(leaf, np.float32), draw_case(17, parts=parts)[0][0]
    )
    params["hf"]["bias"] += np.log(forget / (1 - forget))
    inputs_TBE = np.zeros((num_steps, B, E), np.float32)

    @jax.jit
    def grad(c_BH):
        run = partial(fused_lstm, dtype=jnp.bfloat16)
        return jax.grad(lambda c_BH: run(params, (c_BH, c_BH), inputs_TBE)[0][0].sum())(c_BH)

    with little_optimization():
        grad_BH = grad(np.ones((B, H), np.float32))
    # bfloat16 moves the gate's sum, 6.9, by up to 1/64, and thus 1 - forget by up to 1/64 of it.
    wanted = forget**num_steps
    np.testing.assert_allclose(grad_BH, np.full((B, H), wanted), rtol=num_steps * 0.001 / 64)


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


def test_initial_forget_bias_is_1_and_other_biases_0(initial):
    for gate in GATES:
        wanted_H = np.full(INITIAL_H, 1.0 if gate == "f" else 0.0)
        np.testing.assert_array_equal(initial["h" + gate]["bias"], wanted_H)


def test_initial_recurrent_kernel_has_orthonormal_rows(initial):
    kernel_HG = concat_gates(initial, "h")
    np.testing.assert_allclose(kernel_HG @ kernel_HG.T, np.eye(INITIAL_H), atol=1e-5)
    # Every gate takes part: it is not a unit matrix beside zeros.
    assert all(np.abs(block).max() > 0.1 for block in np.split(kernel_HG, 4, axis=1))


def test_initial_input_kernel_is_glorot_uniform_over_the_gates(initial):
    kernel_EG = concat_gates(initial, "i")
    bound = np.sqrt(6 / (INITIAL_E + 4 * INITIAL_H))
    assert 0.99 * bound < np.max(np.abs(kernel_EG)) <= bound
    # The relative standard error of the variance of n uniform numbers is sqrt(0.8 / n).
    five_deviations = 5 * np.sqrt(0.8 / kernel_EG.size)
    np.testing.assert_allclose(np.var(kernel_EG), bound**2 / 3, rtol=five_deviations)


def test_initial_parameters_follow_the_key(initial):
    same, other = draw_initial(seed=0), draw_initial(seed=1)
    assert_equal(same, initial)
    for name in ("ii", "io", "hi", "ho"):
        assert np.abs(other[name]["kernel"] - initial[name]["kernel"]).max() > 0.01


def test_initial_scales_and_gains_leave_a_plain_layer(initial):
    scaled = draw_initial(multiplicative=True, recurrent_rms_norm=True)
    np.testing.assert_array_equal(scaled.pop("scale")["kernel"], np.zeros((INITIAL_E, INITIAL_H)))
    np.testing.assert_array_equal(scaled.pop("norm")["gain"], np.ones(4 * INITIAL_H))
    assert_equal(scaled, initial)


def test_initial_tree_matches_the_flax_cell(initial):
    cell = nn.OptimizedLSTMCell
    key, inputs_BE = jax.random.key(0), jnp.zeros((B, INITIAL_E))
    carry = (jnp.zeros((B, INITIAL_H)),) * 2
    wanted = jax.eval_shape(cell(features=INITIAL_H).init, key, carry, inputs_BE)["params"]
    assert jax.tree.structure(initial) == jax.tree.structure(wanted)
    assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
