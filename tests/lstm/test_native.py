"""native_lstm: shapes and options, transformations, and where it uses fused_lstm instead."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import SUM_ORDER, assert_close, assert_equal
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lstm_numpy import draw_case, draw_ids, singles

from charlstm.data.batches import Batch
from charlstm.lstm import native
from charlstm.lstm.fused import fused_lstm
from charlstm.lstm.native import native_lstm
from charlstm.lstm.reference import init_lstm
from charlstm.model import CharLSTM
from charlstm.steps import init_state, make_train_step, make_train_steps

pytestmark = pytest.mark.usefixtures("native_library", "cheaply")


def result_and_gradients(recur, arguments, gradients, **options):
    """Return what `recur` returns, also without residuals, and the gradients for `arguments`."""
    *differentiable, inputs = singles(arguments)
    is_ids = jnp.issubdtype(inputs.dtype, jnp.integer)

    def run(*arguments):
        return recur(*arguments, *[inputs] * is_ids, **options)

    @jax.jit
    def whole(gradients, *arguments):
        result, pull = jax.vjp(run, *arguments)
        return run(*arguments), result, pull(gradients)

    return whole(singles(gradients), *differentiable, *[inputs] * (not is_ids))


def draw(seed, t, b, h, parts, is_ids, with_masks):
    """Return (params, carry, inputs), gradients and masks."""
    (params, carry, inputs), gradients = draw_case(seed, t, b, 5, h, parts)
    rng = np.random.default_rng(seed)
    masks = {"keep_TB": rng.random((t, b)) < 0.7, "mask_BH": np.float32(rng.random((b, h)) * 2)}
    inputs = draw_ids(seed, t, b) if is_ids else inputs
    return (params, carry, inputs), gradients, masks if with_masks else {}


@pytest.mark.parametrize(
    ("shape", "parts", "is_ids", "with_masks"),
    [
        ((4, 1, 5), ("scale", "norm"), True, True),
        ((6, 1, 48), ("scale",), True, False),
        ((5, 13, 20), ("norm",), False, True),
        ((4, 30, 80), ("scale", "norm"), False, False),
        ((40, 7, 256), (), True, True),
    ],
)
def test_native_matches_fused(shape, parts, is_ids, with_masks):
    arguments, gradients, masks = draw(1, *shape, parts, is_ids, with_masks)
    found, wanted = (
        result_and_gradients(recur, arguments, gradients, **masks)
        for recur in (native_lstm, fused_lstm)
    )
    assert_close(found, wanted)
    assert_equal(found[0], found[1])


def test_native_loops_match_fused_for_one_time_step(monkeypatch):
    monkeypatch.setattr(native, "MIN_STEPS", 1)
    arguments, gradients, masks = draw(1, 1, 1, 5, ("scale", "norm"), True, True)
    found, wanted = (
        result_and_gradients(recur, arguments, gradients, **masks)
        for recur in (native_lstm, fused_lstm)
    )
    assert_close(found, wanted)


def test_saturated_cell_has_no_gradient():
    params = jax.tree.map(jnp.zeros_like, init_lstm(jax.random.key(0), 5, 32))
    ids_TB, h_BH = jnp.zeros((4, 2), int), jnp.zeros((2, 32))

    def loss(recur, c_BH):
        return recur(params, (c_BH, h_BH), ids_TB)[1].sum()

    for cell in (-500.0, 150.0, 1e30):  # halved four times
        gradients = [
            jax.grad(partial(loss, recur))(jnp.full((2, 32), cell))
            for recur in (native_lstm, fused_lstm)
        ]
        assert_equal(gradients, [jnp.zeros((2, 32))] * 2)


def test_native_threads_do_not_change_bits():
    # Enough work for two threads, which take the pieces in a different order in each run.
    arguments, gradients, _ = draw(2, 20, 8, 128, ("scale", "norm"), True, False)
    run = partial(result_and_gradients, native_lstm, arguments, gradients)
    first = run()
    for _ in range(3):
        assert_equal(run(), first)


def test_training_losses_match_fused(book):
    # Adam divides by small gradients, which enlarges rounding errors; the limit allows for that.
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-3))
    characters, ids_M = np.unique(list(book), return_inverse=True)
    ids_SBT = ids_M[: 14 * 8 * 51].reshape(14, 8, 51)
    ids_SBT = np.tile(ids_SBT, (15, 1, 1))[:200]
    weights_SBT, reset_SB = np.ones((200, 8, 50), np.float32), np.zeros((200, 8), bool)
    batches = Batch(ids_SBT[..., :-1], ids_SBT[..., 1:], weights_SBT, reset_SB)

    def losses(recurrence):
        options = {"multiplicative": True, "recurrent_rms_norm": True, "recurrence": recurrence}
        model = CharLSTM(len(characters), hidden_size=32, **options)
        state = init_state(model, optimizer, jax.random.key(0), 8)
        train_steps = jax.jit(make_train_steps(make_train_step(model, optimizer)))
        return train_steps(state, jax.tree.map(jnp.asarray, batches), 200)[1]["loss"]

    found, wanted = losses("native"), losses("fused")
    assert wanted[-1] < 0.9 * wanted[0]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_native_matches_fused_under_scan_and_vmap():
    (params, carry, ids_TB), _, _ = singles_of(draw(3, 6, 3, 16, ("norm",), True, False))
    many = jnp.stack([ids_TB, ids_TB[::-1]])

    def loss(recur, params):
        def window(carry, ids_TB):
            carry, hidden_TBH = recur(params, carry, ids_TB)
            return carry, hidden_TBH.sum()

        _, scanned = jax.lax.scan(window, carry, many)
        mapped = jax.vmap(lambda ids_TB: recur(params, carry, ids_TB)[1])(many)
        return scanned.sum() + mapped.std()

    found, wanted = (
        jax.jit(jax.value_and_grad(partial(loss, recur)))(params)
        for recur in (native_lstm, fused_lstm)
    )
    assert_close(found, wanted)


def singles_of(case):
    return singles(case[0]), *case[1:]


def is_native(run, *arguments, **options):
    """Return whether a program for a CPU contains a call of native.cc."""
    text = jax.jit(run, **options).lower(*arguments).as_text()
    return "charlstm_lstm" in text


def plain_arguments():
    return singles(draw(4, 6, 8, 16, ("scale", "norm"), True, True)[0])


def test_native_is_used_for_float32_on_one_device():
    arguments = plain_arguments()
    assert is_native(native_lstm, *arguments)
    assert is_native(jax.grad(lambda *a: native_lstm(*a)[1].sum()), *arguments)


@pytest.mark.parametrize("options", [{"dtype": jnp.bfloat16}, {"num_shards": 2}])
def test_native_uses_fused_for_other_options(options):
    arguments = plain_arguments()
    assert not is_native(partial(native_lstm, **options), *arguments)
    found, wanted = (jax.jit(partial(f, **options))(*arguments) for f in (native_lstm, fused_lstm))
    assert_equal(found, wanted)


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_native_uses_fused_for_few_time_steps(num_steps):
    params, carry, ids_TB = plain_arguments()
    arguments = params, carry, ids_TB[:num_steps]
    assert not is_native(native_lstm, *arguments)
    assert_equal(native_lstm(*arguments), fused_lstm(*arguments))


def mesh_of_two():
    return Mesh(np.array(jax.devices()[:2]), "rows")


def test_native_uses_fused_on_several_devices():
    params, carry, ids_TB = plain_arguments()
    rows, columns = PartitionSpec("rows"), PartitionSpec(None, "rows")
    place = partial(NamedSharding, mesh_of_two())
    arguments = (
        jax.device_put(params, place(PartitionSpec())),
        jax.device_put(carry, place(rows)),
        jax.device_put(ids_TB, place(columns)),
    )
    run = lambda recur: jax.grad(lambda *a: recur(*a)[1].sum())  # noqa: E731
    assert not is_native(run(native_lstm), *arguments)
    assert_close(
        jax.jit(run(native_lstm))(*arguments),
        jax.jit(run(fused_lstm))(params, carry, ids_TB),
        SUM_ORDER,
    )


def test_native_uses_fused_inside_shard_map():
    arguments = plain_arguments()
    rows, columns = PartitionSpec("rows"), PartitionSpec(None, "rows")
    run = jax.shard_map(
        lambda *a: native_lstm(*a)[1],
        mesh=mesh_of_two(),
        in_specs=(PartitionSpec(), rows, columns),
        out_specs=columns,
    )
    assert not is_native(run, *arguments)
    assert_close(jax.jit(run)(*arguments), jax.jit(fused_lstm)(*arguments)[1], SUM_ORDER)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_exported_native_program_is_that_of_fused(platform):
    arguments = plain_arguments()
    run = jax.jit(jax.grad(lambda *a: native_lstm(*a)[1].sum()))
    exported = jax.export.export(run, platforms=[platform])(*arguments)
    assert "charlstm_lstm" not in exported.mlir_module()
    if platform == "cpu":
        wanted = jax.jit(jax.grad(lambda *a: fused_lstm(*a)[1].sum()))(*arguments)
        assert_close(exported.call(*arguments), wanted, SUM_ORDER)


def test_native_gradient_cannot_be_differentiated():
    params, carry, ids_TB = plain_arguments()
    loss = lambda params: native_lstm(params, carry, ids_TB)[1].sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="charlstm_loop"):
        jax.jvp(jax.grad(loss), (params,), (params,))


FORWARD_SHAPES = [(0,), (0,), (0,), (0,), (2, 2, 32, 2, 16), (7, 128), (3, 32), (3, 32)]
FORWARD_RESULTS = [(2, 3, 32), (3, 32), (0,), (0,), (0,), (0,), (0,)]


@pytest.mark.parametrize(
    ("index", "shape", "dtype"),
    [
        (4, (2, 2, 32, 1, 32), "float32"),
        (4, (2, 2, 32, 2, 16), "int32"),
        (0, (2, 4), "int32"),
        (0, (2, 3), "float32"),
        (1, (3,), "bool"),
        (3, (129,), "float32"),
        (5, (7, 120), "float32"),
        (5, (6, 128), "float32"),
        (7, (3, 33), "float32"),
    ],
)
def test_handler_refuses_wrong_arguments(index, shape, dtype):
    arguments = [jnp.zeros(shape) for shape in FORWARD_SHAPES]
    arguments[:2] = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3), bool)
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in FORWARD_RESULTS]
    call = jax.ffi.ffi_call("charlstm_lstm_Forward", results)
    options = {"sizes": np.array([2, 3, 32, 128, 7]), "epsilon": np.float32(0.1)}
    call(*arguments, **options)
    arguments[index] = jnp.zeros(shape, dtype)
    with pytest.raises(Exception, match=f"wrong argument {index + 1}"):
        jax.block_until_ready(call(*arguments, **options))


@pytest.mark.parametrize(
    "sizes", [[2, 3, 32, 128], [2, 3, 16, 64, 7], [2, 3, 32, 129, 7], [-2, 3, 32, 128, 7], [0] * 5]
)
@pytest.mark.parametrize("name", ["Forward", "Backward"])
def test_handler_refuses_wrong_sizes(name, sizes):
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in FORWARD_RESULTS]
    call = jax.ffi.ffi_call(f"charlstm_lstm_{name}", results)
    with pytest.raises(Exception, match="wrong sizes"):
        jax.block_until_ready(
            call(*map(jnp.zeros, FORWARD_SHAPES), sizes=np.array(sizes), epsilon=np.float32(0.1))
        )
