"""The LSTM over time, twice: the Flax cell scanned, and its fast twin with a gradient by hand.

Both are pure functions (params, carry, inputs) -> (carry, hidden_TBH) on exactly the parameter
tree of Flax's LSTM cells: kernels `ii if ig io` from the input, kernels and biases `hi hf hg ho`
from the hidden state, for the input gate, the forget gate, the candidate and the output gate.

    i, f, o = sigmoid(x W_i* + h W_h* + b_*)     g = tanh(x W_ig + h W_hg + b_g)
    c' = f c + i g                               h' = o tanh(c')

Sources: Hochreiter and Schmidhuber 1997; Gers et al. 2000 (the forget gate); Greff et al. 2015,
arXiv 1503.04069 ('vanilla LSTM', here without peepholes).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Params = dict[str, dict[str, jax.Array]]
LayerCarry = tuple[jax.Array, jax.Array]

GATES = "ifgo"
CELLS: dict[str, Any] = {"OptimizedLSTMCell": nn.OptimizedLSTMCell, "LSTMCell": nn.LSTMCell}


def init_lstm(key: jax.Array, input_size: int, hidden_size: int) -> Params:
    """Return the initial parameters of one layer, drawn as Keras draws them.

    The four gates side by side make one input kernel, Glorot-uniform, and one recurrent kernel
    with orthonormal rows (Saxe et al. 2013, arXiv 1312.6120). The forget bias is 1, so that the
    cell remembers until it learns to forget (Jozefowicz et al. 2015); other biases are 0.
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
    return params


def flax_lstm(
    params: Params,
    carry: LayerCarry,
    inputs: jax.Array,
    *,
    cell: str = "OptimizedLSTMCell",
    dtype: Any = jnp.float32,
) -> tuple[LayerCarry, jax.Array]:
    """Run one LSTM layer over time by scanning the Flax cell: the readable twin.

    Args:
      params: the parameters of a Flax LSTM cell with H hidden units.
      carry: (c_BH, h_BH).
      inputs: inputs_TBE, or integers ids_TB that stand for one-hot vectors.
      cell: a name in CELLS.
      dtype: the type to compute the gates in.

    Returns:
      The carry after the last time step, and hidden_TBH, the output of every time step.
    """
    if jnp.issubdtype(inputs.dtype, jnp.integer):
        inputs = jax.nn.one_hot(inputs, params["ii"]["kernel"].shape[0], dtype=dtype)
    flax_cell = CELLS[cell](features=carry[0].shape[-1], dtype=dtype)

    def step(carry: LayerCarry, inputs_BE: jax.Array) -> tuple[LayerCarry, jax.Array]:
        new_carry, _ = flax_cell.apply({"params": params}, carry, inputs_BE)
        # Rounding the cell state at every step would lose what it has to remember.
        c_BH, h_BH = (new.astype(old.dtype) for new, old in zip(new_carry, carry, strict=True))
        return (c_BH, h_BH), h_BH

    return jax.lax.scan(step, carry, inputs)


def fused_lstm(
    params: Params, carry: LayerCarry, inputs: jax.Array, *, dtype: Any = jnp.float32
) -> tuple[LayerCarry, jax.Array]:
    """Run one LSTM layer over time with as few, as large matrix products as possible.

    Arguments and result are flax_lstm's, and so are the gradients, in reverse mode only. The input
    side of all time steps is one product (a row lookup for ids), and so is each weight gradient.
    Differentiation keeps 6 floats per B·T·H: four gates, c and h.
    """
    input_kernel_EG, recurrent_kernel_HG = (
        jnp.concatenate([params[f"{side}{gate}"]["kernel"] for gate in GATES], axis=1).astype(dtype)
        for side in "ih"
    )
    bias_G = jnp.concatenate([params[f"h{gate}"]["bias"] for gate in GATES]).astype(dtype)
    if jnp.issubdtype(inputs.dtype, jnp.integer):
        # The bias joins the rows that are looked up, which are fewer than the time steps.
        drive_TBG = _lookup(input_kernel_EG + bias_G, inputs)
    else:
        drive_TBG = inputs.astype(dtype) @ input_kernel_EG + bias_G
    return _recur(recurrent_kernel_HG, carry, drive_TBG)


@jax.custom_vjp
def _lookup(kernel_EG: jax.Array, ids_TB: jax.Array) -> jax.Array:
    return kernel_EG[ids_TB]


def _lookup_forward(kernel_EG: jax.Array, ids_TB: jax.Array) -> tuple[jax.Array, Any]:
    return kernel_EG[ids_TB], (ids_TB, kernel_EG.shape[0])


def _lookup_backward(residuals: Any, grad_TBG: jax.Array) -> tuple[jax.Array, None]:
    # One product with the one-hot inputs, where the gradient of a lookup would add row by row.
    ids_TB, size = residuals
    one_hot_TBE = jax.nn.one_hot(ids_TB, size, dtype=grad_TBG.dtype)
    return jnp.einsum("tbe,tbg->eg", one_hot_TBE, grad_TBG), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def _gates(sums_BG: jax.Array) -> tuple[jax.Array, ...]:
    i_BH, f_BH, g_BH, o_BH = jnp.split(sums_BG, 4, axis=-1)
    return jax.nn.sigmoid(i_BH), jax.nn.sigmoid(f_BH), jnp.tanh(g_BH), jax.nn.sigmoid(o_BH)


def _scan(
    kernel_HG: jax.Array, carry: LayerCarry, drive_TBG: jax.Array, keep: bool
) -> tuple[LayerCarry, Any]:
    def step(carry: LayerCarry, drive_BG: jax.Array) -> tuple[LayerCarry, Any]:
        c_BH, h_BH = carry
        product_BG = jnp.dot(
            h_BH.astype(kernel_HG.dtype), kernel_HG, preferred_element_type=c_BH.dtype
        )
        i_BH, f_BH, g_BH, o_BH = _gates(drive_BG + product_BG)
        c_BH = f_BH * c_BH + i_BH * g_BH
        h_BH = o_BH * jnp.tanh(c_BH)
        kept = (c_BH, jnp.concatenate([i_BH, f_BH, g_BH, o_BH], axis=-1)) if keep else ()
        return (c_BH, h_BH), (h_BH, *kept)

    return jax.lax.scan(step, carry, drive_TBG)


@jax.custom_vjp
def _recur(
    kernel_HG: jax.Array, carry: LayerCarry, drive_TBG: jax.Array
) -> tuple[LayerCarry, jax.Array]:
    carry, (hidden_TBH,) = _scan(kernel_HG, carry, drive_TBG, keep=False)
    return carry, hidden_TBH


def _recur_forward(
    kernel_HG: jax.Array, carry: LayerCarry, drive_TBG: jax.Array
) -> tuple[tuple[LayerCarry, jax.Array], Any]:
    last_carry, (hidden_TBH, c_TBH, gates_TBG) = _scan(kernel_HG, carry, drive_TBG, keep=True)
    residuals = (kernel_HG, carry, drive_TBG[:0], hidden_TBH, c_TBH, gates_TBG)
    return (last_carry, hidden_TBH), residuals


def _recur_backward(residuals: Any, grads: Any) -> tuple[jax.Array, LayerCarry, jax.Array]:
    kernel_HG, (c_BH, h_BH), drive_0BG, hidden_TBH, c_TBH, gates_TBG = residuals
    last_carry_grad, hidden_grad_TBH = grads
    kernel_GH = kernel_HG.T

    def step(carry_grad: LayerCarry, inputs: Any) -> tuple[LayerCarry, jax.Array]:
        dc_BH, dh_BH = carry_grad
        hidden_grad_BH, c_BH, c_before_BH, gates_BG = inputs
        i_BH, f_BH, g_BH, o_BH = jnp.split(gates_BG, 4, axis=-1)
        dh_BH = dh_BH + hidden_grad_BH
        tanh_BH = jnp.tanh(c_BH)
        dc_BH = dc_BH + dh_BH * o_BH * (1 - tanh_BH**2)
        sums_grad_BG = jnp.concatenate(
            [
                dc_BH * g_BH * i_BH * (1 - i_BH),
                dc_BH * c_before_BH * f_BH * (1 - f_BH),
                dc_BH * i_BH * (1 - g_BH**2),
                dh_BH * tanh_BH * o_BH * (1 - o_BH),
            ],
            axis=-1,
        )
        dh_BH = jnp.dot(
            sums_grad_BG.astype(kernel_GH.dtype), kernel_GH, preferred_element_type=dc_BH.dtype
        )
        return (dc_BH * f_BH, dh_BH), sums_grad_BG.astype(drive_0BG.dtype)

    c_before_TBH = jnp.concatenate([c_BH[None], c_TBH[:-1]])
    h_before_TBH = jnp.concatenate([h_BH[None], hidden_TBH[:-1]])
    carry_grad, drive_grad_TBG = jax.lax.scan(
        step, last_carry_grad, (hidden_grad_TBH, c_TBH, c_before_TBH, gates_TBG), reverse=True
    )
    # One product over all B·T rows, where the scan would add T small ones.
    kernel_grad_HG = jnp.einsum("tbh,tbg->hg", h_before_TBH, drive_grad_TBG).astype(kernel_HG.dtype)
    return kernel_grad_HG, carry_grad, drive_grad_TBG


_recur.defvjp(_recur_forward, _recur_backward)
