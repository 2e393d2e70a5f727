"""The LSTM over time: the Flax cell scanned, its fast twin with a gradient by hand, and cuDNN's.

All are pure functions (params, carry, inputs) -> (carry, hidden_TBH) on exactly the parameter
tree of Flax's LSTM cells: kernels `ii if ig io` from the input, kernels and biases `hi hf hg ho`
from the hidden state, for the input gate, the forget gate, the candidate and the output gate.

    i, f, o = sigmoid(x W_i* + h W_h* + b_*)     g = tanh(x W_ig + h W_hg + b_g)
    c' = f c + i g                               h' = o tanh(c')

A layer may have one kernel more, `scale` from the input: its gates then see (1 + x W_scale) * h in
place of h, so that what the cell recalls depends on what it reads. That is the multiplicative LSTM
(Krause et al. 2016, arXiv 1609.07959) without its own recurrent kernel, or one round of the
Mogrifier (Melis et al. 2019, arXiv 1909.01792) without its sigmoid.

Sources: Hochreiter and Schmidhuber 1997; Gers et al. 2000 (the forget gate); Greff et al. 2015,
arXiv 1503.04069 ('vanilla LSTM', here without peepholes).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Params = dict[str, dict[str, jax.Array]]
LayerCarry = tuple[jax.Array, jax.Array]

GATES = "ifgo"
CELLS: dict[str, Any] = {"OptimizedLSTMCell": nn.OptimizedLSTMCell, "LSTMCell": nn.LSTMCell}


def init_lstm(
    key: jax.Array, input_size: int, hidden_size: int, scale_hidden: bool = False
) -> Params:
    """Return the initial parameters of one layer, drawn as Keras draws them.

    The four gates side by side make one input kernel, Glorot-uniform, and one recurrent kernel
    with orthonormal rows (Saxe et al. 2013, arXiv 1312.6120). The forget bias is 1, so that the
    cell remembers until it learns to forget (Jozefowicz et al. 2015); other biases are 0. So is
    the kernel that `scale_hidden` asks for, which scales by 1 until it learns better.
    """
    input_key, recurrent_key = jax.random.split(key)
    glorot, orthogonal = nn.initializers.glorot_uniform(), nn.initializers.orthogonal()
    input_kernel_EG = glorot(input_key, (input_size, 4 * hidden_size))
    recurrent_kernel_HG = orthogonal(recurrent_key, (hidden_size, 4 * hidden_size))
    params: Params = {}
    for gate, kernel_EH, kernel_HH in zip(
        GATES,
        jnp.split(input_kernel_EG, 4, axis=1),
        jnp.split(recurrent_kernel_HG, 4, axis=1),
        strict=True,
    ):
        params[f"i{gate}"] = {"kernel": kernel_EH}
        bias_H = jnp.full(hidden_size, gate == "f", dtype=jnp.float32)
        params[f"h{gate}"] = {"kernel": kernel_HH, "bias": bias_H}
    if scale_hidden:
        params["scale"] = {"kernel": jnp.zeros((input_size, hidden_size))}
    return params


def flax_lstm(
    params: Params,
    carry: LayerCarry,
    inputs: jax.Array,
    *,
    keep_TB: jax.Array | None = None,
    cell: str = "OptimizedLSTMCell",
    dtype: Any = jnp.float32,
) -> tuple[LayerCarry, jax.Array]:
    """Run one LSTM layer over time by scanning the Flax cell: the readable twin.

    Args:
      params: the parameters of a Flax LSTM cell with H hidden units, and perhaps `scale`.
      carry: (c_BH, h_BH).
      inputs: inputs_TBE, or integers ids_TB that stand for one-hot vectors.
      keep_TB: bool, False where a time step begins from an empty carry; None is True everywhere.
      cell: a name in CELLS.
      dtype: the type to compute the gates in.

    Returns:
      The carry after the last time step, and hidden_TBH, the output of every time step.
    """
    inputs_TBE = _as_vectors(params, inputs, dtype)
    flax_cell = CELLS[cell](features=carry[0].shape[-1], dtype=dtype)
    cell_params = {name: params[name] for name in params if name != "scale"}

    def step(carry: LayerCarry, inputs: Any) -> tuple[LayerCarry, jax.Array]:
        inputs_BE, keep_B = inputs
        c_BH, h_BH = (_kept(leaf_BH, keep_B) for leaf_BH in carry)
        if "scale" in params:
            scale_BH = 1 + inputs_BE.astype(dtype) @ params["scale"]["kernel"].astype(dtype)
            h_BH = (h_BH * scale_BH).astype(h_BH.dtype)
        new_carry, _ = flax_cell.apply({"params": cell_params}, (c_BH, h_BH), inputs_BE)
        # Rounding the cell state at every step would lose what it has to remember.
        c_BH, h_BH = (new.astype(old.dtype) for new, old in zip(new_carry, carry, strict=True))
        return (c_BH, h_BH), h_BH

    return jax.lax.scan(step, carry, (inputs_TBE, keep_TB))


def fused_lstm(
    params: Params,
    carry: LayerCarry,
    inputs: jax.Array,
    *,
    keep_TB: jax.Array | None = None,
    dtype: Any = jnp.float32,
    num_shards: int = 1,
) -> tuple[LayerCarry, jax.Array]:
    """Run one LSTM layer over time with as few, as large matrix products as possible.

    Arguments and result are flax_lstm's, and so are the gradients, in reverse mode only: jax.jvp
    and second derivatives raise TypeError, and flax_lstm has them. What reaches the gates from
    vectors is one product for all time steps, and from ids a row looked up at each.

    Differentiation keeps 7 floats per B·T·H, six local derivatives and h, and an eighth where
    vectors scale the hidden state. Under jax.checkpoint it keeps them during the backward pass
    only, which for a single layer saves nothing.

    Where the rows lie on several devices, `num_shards` tells on how many. The gradient of the
    weights is then summed over time for the rows of each apart, and once over all. Otherwise XLA
    would let the devices add theirs up at every chunk of time steps.
    """
    # Since sigmoid(s) = (1 + tanh(s / 2)) / 2, with halved sums one tanh serves all four gates.
    halve_G = jnp.repeat(jnp.array([0.5, 0.5, 1.0, 0.5], dtype), carry[0].shape[-1])
    input_kernel_EG, recurrent_kernel_HG = (
        jnp.concatenate([params[f"{side}{gate}"]["kernel"] for gate in GATES], axis=1) * halve_G
        for side in "ih"
    )
    bias_F = jnp.concatenate([params[f"h{gate}"]["bias"] for gate in GATES]) * halve_G
    input_kernel_EF = input_kernel_EG
    if "scale" in params:
        # Scales are looked up, or computed, as what drives the gates is, and beside it.
        input_kernel_EF = jnp.concatenate([input_kernel_EG, params["scale"]["kernel"]], axis=1)
        bias_F = jnp.concatenate([bias_F, jnp.ones_like(params["hi"]["bias"])])
    if _are_ids(inputs):
        # The bias joins the rows that are looked up, which are fewer than the time steps.
        rows_EF = (input_kernel_EF + bias_F).astype(dtype)
    else:
        rows_EF = jnp.zeros((0, bias_F.size), dtype)
        inputs = inputs.astype(dtype) @ input_kernel_EF.astype(dtype) + bias_F.astype(dtype)
    recur = partial(_recur, recurrent_kernel_HG.astype(dtype), rows_EF)
    return _by_shards(recur, num_shards)(carry, inputs, keep_TB)


def cudnn_lstm(
    params: Params,
    carry: LayerCarry,
    inputs: jax.Array,
    *,
    keep_TB: jax.Array | None = None,
    dtype: Any = jnp.float32,
) -> tuple[LayerCarry, jax.Array]:
    """Run one LSTM layer over time as cuDNN does; not yet run on a GPU.

    Arguments and result are flax_lstm's, and so are the gradients, in reverse mode and not under
    vmap. Only the weights' packing and the order of axes have been tested, on a CPU.

    Raises:
      ValueError: without an NVIDIA GPU, for another dtype than float32, for keep_TB, since cuDNN
        has no carry that begins anew within a sequence, and for `scale`, which it does not have.
    """
    from jax.experimental import rnn

    if jnp.dtype(dtype) != jnp.float32:
        raise ValueError(f"dtype={dtype}: cuDNN's LSTM takes float32 only")
    if keep_TB is not None:
        raise ValueError("keep_TB: cuDNN's LSTM has no carry that begins anew within a sequence")
    if "scale" in params:
        raise ValueError("scale: cuDNN's LSTM does not scale its hidden state")
    if jax.default_backend() != "gpu":
        raise ValueError(
            f"cuDNN's LSTM needs an NVIDIA GPU, and JAX has found {jax.default_backend()}"
        )
    inputs_TBE = _as_vectors(params, inputs, dtype)
    num_steps, batch_size, input_size = inputs_TBE.shape
    c_BH, h_BH = carry
    hidden_BTH, h_1BH, c_1BH = rnn.lstm(
        inputs_TBE.swapaxes(0, 1),
        h_BH[None],
        c_BH[None],
        pack_cudnn(params),
        jnp.full(batch_size, num_steps, jnp.int32),
        input_size=input_size,
        hidden_size=h_BH.shape[-1],
        num_layers=1,
        dropout=0.0,
        bidirectional=False,
    )
    return (c_1BH[0], h_1BH[0]), hidden_BTH.swapaxes(0, 1)


def _are_ids(inputs: jax.Array) -> bool:
    return jnp.issubdtype(inputs.dtype, jnp.integer)


def _kept(leaf_BH: jax.Array, keep_B: jax.Array | None) -> jax.Array:
    """Return `leaf_BH` with zeros in the rows that begin anew."""
    return leaf_BH if keep_B is None else jnp.where(keep_B[..., None], leaf_BH, 0)


def _as_vectors(params: Params, inputs: jax.Array, dtype: Any) -> jax.Array:
    """Return inputs_TBE, for ids the one-hot vectors that they stand for."""
    if not _are_ids(inputs):
        return inputs
    return jax.nn.one_hot(inputs, params["ii"]["kernel"].shape[0], dtype=dtype)


def pack_cudnn(params: Params) -> jax.Array:
    """Return the parameters as cuDNN takes them: one vector of kernels, transposed, then biases.

    cuDNN adds two biases, of which Flax's cell has the second.
    """
    kernels = [params[f"{side}{gate}"]["kernel"].T.ravel() for side in "ih" for gate in GATES]
    biases = [params[f"h{gate}"]["bias"] for gate in GATES]
    return jnp.concatenate([*kernels, *map(jnp.zeros_like, biases), *biases])


def _scan(
    kernel_HG: jax.Array,
    rows_EF: jax.Array,
    carry: LayerCarry,
    inputs: jax.Array,
    keep_TB: jax.Array | None,
    with_slopes: bool,
) -> tuple[LayerCarry, Any]:
    def step(carry: LayerCarry, given: Any) -> tuple[LayerCarry, Any]:
        inputs_B, keep_B = given
        c_before_BH, h_BH = (_kept(leaf_BH, keep_B) for leaf_BH in carry)
        # Looked up here, where it stays in the cache, and not for all time steps before.
        drive_BF = rows_EF[inputs_B] if _are_ids(inputs) else inputs_B
        scale_BH = _scale(drive_BF, h_BH.shape[-1])
        seen_BH = h_BH if scale_BH is None else h_BH * scale_BH
        product_BG = jnp.dot(
            seen_BH.astype(kernel_HG.dtype), kernel_HG, preferred_element_type=c_before_BH.dtype
        )
        tanh_BG = jnp.tanh(drive_BF[..., : product_BG.shape[-1]] + product_BG)
        i_BH, f_BH, g_BH, o_BH = jnp.split(tanh_BG, 4, axis=-1)
        i_BH, f_BH, o_BH = ((1 + tanh_BH) / 2 for tanh_BH in (i_BH, f_BH, o_BH))
        c_BH = f_BH * c_before_BH + i_BH * g_BH
        tanh_c_BH = jnp.tanh(c_BH)
        h_BH = o_BH * tanh_c_BH
        if not with_slopes:
            return (c_BH, h_BH), (h_BH,)
        factors_BG = jnp.concatenate([g_BH / 2, c_before_BH / 2, i_BH, tanh_c_BH / 2], axis=-1)
        dc_by_dc_BH = _kept(f_BH, keep_B)
        slopes = (1 - tanh_BG**2) * factors_BG, o_BH * (1 - tanh_c_BH**2), dc_by_dc_BH
        return (c_BH, h_BH), (h_BH, slopes)

    return jax.lax.scan(step, carry, (inputs, keep_TB))


def _scale(drive_XF: jax.Array, hidden_size: int) -> jax.Array | None:
    """Return scale_XH, which stands behind the four gates, if it does; X are any other axes."""
    scale_XH = drive_XF[..., 4 * hidden_size :]
    return scale_XH if scale_XH.shape[-1] else None


def _by_shards(recur: Callable[..., Any], num_shards: int) -> Callable[..., Any]:
    """Return recur(carry, inputs, keep_TB) done for groups of rows that know nothing of another."""

    def recur_by_shards(carry: LayerCarry, inputs: jax.Array, keep_TB: Any) -> Any:
        batch_size = inputs.shape[1]
        if num_shards == 1 or batch_size % num_shards:
            return recur(carry, inputs, keep_TB)

        def cut(leaf: jax.Array, axis: int) -> jax.Array:
            return leaf.reshape(*leaf.shape[:axis], num_shards, -1, *leaf.shape[axis + 1 :])

        over_time = jax.tree.map(partial(cut, axis=1), (inputs, keep_TB))
        by_rows = jax.tree.map(partial(cut, axis=0), carry)
        carry, hidden_TDBH = jax.vmap(recur, (0, 1, 1), (0, 1))(by_rows, *over_time)
        carry = jax.tree.map(lambda leaf_DBH: leaf_DBH.reshape(batch_size, -1), carry)
        return carry, hidden_TDBH.reshape(*inputs.shape[:2], -1)

    return recur_by_shards


@jax.custom_vjp
def _recur(
    kernel_HG: jax.Array,
    rows_EF: jax.Array,
    carry: LayerCarry,
    inputs: jax.Array,
    keep_TB: jax.Array | None,
) -> tuple[LayerCarry, jax.Array]:
    """Run the recurrence on halved sums; `inputs` are ids_TB of rows_EF, or drive_TBF itself.

    F are the four gates, and then perhaps the H scales.
    """
    carry, (hidden_TBH,) = _scan(kernel_HG, rows_EF, carry, inputs, keep_TB, with_slopes=False)
    return carry, hidden_TBH


def _recur_forward(
    kernel_HG: jax.Array,
    rows_EF: jax.Array,
    carry: LayerCarry,
    inputs: jax.Array,
    keep_TB: jax.Array | None,
) -> tuple[tuple[LayerCarry, jax.Array], Any]:
    last_carry, (hidden_TBH, slopes) = _scan(
        kernel_HG, rows_EF, carry, inputs, keep_TB, with_slopes=True
    )
    h_before_TBH = _kept(jnp.concatenate([carry[1][None], hidden_TBH[:-1]]), keep_TB)
    # The backward pass reads only the scales of what drives the gates, a fifth of it.
    given = inputs if _are_ids(inputs) else _scale(inputs, carry[1].shape[-1])
    return (last_carry, hidden_TBH), (kernel_HG, rows_EF, given, keep_TB, h_before_TBH, slopes)


def _recur_backward(residuals: Any, grads: Any) -> tuple[Any, ...]:
    kernel_HG, rows_EF, given, keep_TB, h_before_TBH, slopes = residuals
    last_carry_grad, hidden_grad_TBH = grads
    num_steps, batch_size, hidden_size = h_before_TBH.shape
    dtype, kernel_GH = kernel_HG.dtype, kernel_HG.T
    is_lookup = rows_EF.shape[0] > 0  # otherwise `given` is scale_TBH, or None
    scale_EH = _scale(rows_EF, hidden_size)

    def step(carry_grad: LayerCarry, kept: Any) -> tuple[LayerCarry, jax.Array]:
        dc_BH, dh_BH = carry_grad
        hidden_grad_BH, (slopes_BG, dh_by_dc_BH, dc_by_dc_BH), keep_B, scale_BH, h_before_BH = kept
        dh_BH = dh_BH + hidden_grad_BH
        dc_BH = dc_BH + dh_BH * dh_by_dc_BH
        by_gate_BG = jnp.concatenate([dc_BH, dc_BH, dc_BH, dh_BH], axis=-1)
        sums_grad_BG = (slopes_BG * by_gate_BG).astype(dtype)
        dh_BH = jnp.dot(sums_grad_BG, kernel_GH, preferred_element_type=dc_BH.dtype)
        drive_grad_BF = sums_grad_BG
        if scale_BH is not None:
            scale_grad_BH = (dh_BH * h_before_BH).astype(dtype)
            drive_grad_BF = jnp.concatenate([sums_grad_BG, scale_grad_BH], axis=-1)
            dh_BH = dh_BH * scale_BH
        return (dc_BH * dc_by_dc_BH, _kept(dh_BH, keep_B)), drive_grad_BF

    def chunk_step(state: Any, chunk: Any) -> tuple[Any, jax.Array | None]:
        carry_grad, kernel_grad_HG, rows_grad_EF = state
        *kept, h_before_tBH, given_tB = chunk
        # Of None there are no rows.
        scale_tBH = jax.tree.map(lambda s: s[given_tB], scale_EH) if is_lookup else given_tB
        kept = *kept, scale_tBH, h_before_tBH
        carry_grad, drive_grad_tBF = jax.lax.scan(step, carry_grad, kept, reverse=True)
        seen_tBH = h_before_tBH if scale_tBH is None else h_before_tBH * scale_tBH
        # One product over the rows of many time steps, where step would add small ones.
        kernel_grad_HG += jnp.einsum(
            "tbh,tbg->hg",
            seen_tBH.astype(dtype),
            drive_grad_tBF[..., : kernel_HG.shape[-1]],
            preferred_element_type=kernel_grad_HG.dtype,
        )
        if not is_lookup:
            return (carry_grad, kernel_grad_HG, rows_grad_EF), drive_grad_tBF
        # On CPUs adding takes a sixth of the product's time; on GPUs its order is left to chance,
        # and TPUs are slow at it.
        rows_grad_EF = jax.lax.platform_dependent(
            rows_grad_EF, given_tB, drive_grad_tBF, cpu=add_in_place, default=add_by_product
        )
        return (carry_grad, kernel_grad_HG, rows_grad_EF), None

    # In chunks, so that the gradient of the sums need not be kept for all time steps.
    length = _chunk_length(num_steps, batch_size)
    chunks = jax.tree.map(
        lambda leaf_T: leaf_T.reshape(num_steps // length, length, *leaf_T.shape[1:]),
        (hidden_grad_TBH, slopes, keep_TB, h_before_TBH, given),
    )
    zeros = (jnp.zeros(leaf.shape, h_before_TBH.dtype) for leaf in (kernel_HG, rows_EF))
    (carry_grad, *weight_grads), inputs_grad = jax.lax.scan(
        chunk_step, (last_carry_grad, *zeros), chunks, reverse=True
    )
    if inputs_grad is not None:
        inputs_grad = inputs_grad.reshape(num_steps, batch_size, -1)
    return *(grad.astype(dtype) for grad in weight_grads), carry_grad, inputs_grad, None


def add_in_place(rows_EF: jax.Array, ids_TB: jax.Array, values_TBF: jax.Array) -> jax.Array:
    """Return `rows_EF` with each of the values added to the row of its id."""
    return rows_EF.at[ids_TB].add(values_TBF.astype(rows_EF.dtype))


def add_by_product(rows_EF: jax.Array, ids_TB: jax.Array, values_TBF: jax.Array) -> jax.Array:
    """Return what add_in_place does, as a product with one-hot vectors."""
    one_hot_TBE = jax.nn.one_hot(ids_TB, rows_EF.shape[0], dtype=values_TBF.dtype)
    return rows_EF + jnp.einsum(
        "tbe,tbf->ef", one_hot_TBE, values_TBF, preferred_element_type=rows_EF.dtype
    )


def _chunk_length(num_steps: int, batch_size: int) -> int:
    """Return the smallest divisor of T that gives the weight gradient's product 1024 rows."""
    divisors = (n for n in range(1, num_steps) if num_steps % n == 0 and n * batch_size >= 1024)
    return next(divisors, num_steps)


_recur.defvjp(_recur_forward, _recur_backward)
