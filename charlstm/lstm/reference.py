"""The LSTM over time: its parameters, and the Flax cell scanned.

flax_lstm, fused_lstm and cudnn_lstm are pure functions (params, carry, inputs) ->
(carry, hidden_TBH) of the same parameters, the tree of Flax's LSTM cells: kernels `ii if ig io`
from the input, kernels and biases `hi hf hg ho` from the hidden state, for the input gate, the
forget gate, the candidate and the output gate.

    i, f, o = sigmoid(x W_i* + h W_h* + b_*)     g = tanh(x W_ig + h W_hg + b_g)
    c' = f c + i g                               h' = o tanh(c')

A multiplicative layer has one more kernel, `scale`, from the input: its gates read
(1 + x W_scale) * h in place of h. This is the multiplicative LSTM (Krause et al. 2016,
arXiv 1609.07959) without its own recurrent kernel, or one round of the Mogrifier (Melis et al.
2019, arXiv 1909.01792) without its sigmoid.

A layer with recurrent RMS norm has `norm`, a gain for each of the 4H sums: the recurrent products
h W_h* are divided by the root mean square of all four and multiplied by the gain. This is RMSNorm
(Zhang and Sennrich 2019, arXiv 1910.07467) at the place of the recurrent batch norm of Cooijmans et
al. 2016 (arXiv 1603.09025) and the layer norm of Ba et al. 2016 (arXiv 1607.06450).

Sources: Hochreiter and Schmidhuber 1997; Gers et al. 2000 (the forget gate); Greff et al. 2015,
arXiv 1503.04069 ('vanilla LSTM', here without peepholes).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

Params = dict[str, dict[str, jax.Array]]
LayerCarry = tuple[jax.Array, jax.Array]


class LayerStates(NamedTuple):
    """States and gates of one layer at each character."""

    c_BTH: jax.Array  # the cell state after the character
    h_BTH: jax.Array  # the hidden state after the character, which is the layer's output
    input_gate_BTH: jax.Array  # factor of the candidate, 0 to 1
    forget_gate_BTH: jax.Array  # factor of the previous cell state, 0 to 1
    candidate_BTH: jax.Array  # new content of the cell, -1 to 1
    output_gate_BTH: jax.Array  # factor of tanh(c), 0 to 1


GATES = "ifgo"
# A much smaller value scales the sums after a zero carry up to the size of all others, and their
# rounding errors too.
NORM_EPSILON = 0.1


def init_lstm(
    key: jax.Array,
    input_size: int,
    hidden_size: int,
    multiplicative: bool = False,
    recurrent_rms_norm: bool = False,
) -> Params:
    """Return the initial parameters of one layer, from the distributions of Keras.

    The concatenated gates have a Glorot-uniform input kernel and a recurrent kernel with
    orthonormal rows (Saxe et al. 2013, arXiv 1312.6120). The forget bias is 1, so that the cell
    starts by remembering (Jozefowicz et al. 2015); the other biases are 0. With `multiplicative`
    the kernel `scale` is 0, which makes every scale 1; with `recurrent_rms_norm` the gains are 1.
    """
    input_key, recurrent_key = jax.random.split(key)
    glorot, orthogonal = nn.initializers.glorot_uniform(), nn.initializers.orthogonal()
    shapes = (input_size, 4 * hidden_size), (hidden_size, 4 * hidden_size)
    input_kernel_EG = glorot(input_key, shapes[0], jnp.float32)
    recurrent_kernel_HG = orthogonal(recurrent_key, shapes[1], jnp.float32)
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
    if multiplicative:
        params["scale"] = {"kernel": jnp.zeros((input_size, hidden_size), jnp.float32)}
    if recurrent_rms_norm:
        params["norm"] = {"gain": jnp.ones(4 * hidden_size, jnp.float32)}
    return params


def flax_lstm(
    params: Params,
    carry: LayerCarry,
    inputs: jax.Array,
    *,
    keep_TB: jax.Array | None = None,
    mask_BH: jax.Array | None = None,
    norm_epsilon: float = NORM_EPSILON,
    dtype: Any = jnp.float32,
) -> tuple[LayerCarry, jax.Array]:
    """Run one LSTM layer over time by scanning the Flax cell: the reference implementation.

    Args:
      params: parameters of a Flax LSTM cell with H hidden units, optionally `scale` and `norm`.
      carry: (c_BH, h_BH).
      inputs: inputs_TBE, or integers ids_TB in place of one-hot vectors.
      keep_TB: bool, False where a time step starts from a zero carry; None means True everywhere.
      mask_BH: multiplies the hidden state that the gates read, at all time steps, such as a
        dropout mask; it gets no gradient. None means 1 everywhere.
      norm_epsilon: added to the mean square of the recurrent products, with `norm`.
      dtype: type of the gates.

    Returns:
      The carry after the last time step, and hidden_TBH, the output of every time step.
    """
    params, carry, inputs = vary_alike((params, carry, inputs))
    inputs_TBE = as_one_hot(params, inputs, dtype)
    flax_cell = nn.OptimizedLSTMCell(features=carry[0].shape[-1], dtype=dtype)
    cell_params = _with_gains(params)
    recurrent_kernel_HG = concat_gates(params, "h").astype(dtype)

    def step(carry: LayerCarry, inputs: Any) -> tuple[LayerCarry, jax.Array]:
        inputs_BE, keep_B = inputs
        c_BH, h_BH = (mask_rows(leaf_BH, keep_B) for leaf_BH in carry)
        if "scale" in params:
            scale_BH = 1 + inputs_BE.astype(dtype) @ params["scale"]["kernel"].astype(dtype)
            h_BH = (h_BH * scale_BH).astype(h_BH.dtype)
        if mask_BH is not None:
            h_BH = h_BH * jax.lax.stop_gradient(mask_BH)
        if "norm" in params:
            # The cell's products are linear in h, so scaling h scales them.
            product_BG = h_BH.astype(dtype) @ recurrent_kernel_HG
            h_BH = h_BH * inverse_rms(product_BG.astype(h_BH.dtype), norm_epsilon)
        new_carry, _ = flax_cell.apply({"params": cell_params}, (c_BH, h_BH), inputs_BE)
        # The carry stays in its own type: rounding it at every step loses small changes.
        c_BH, h_BH = (new.astype(old.dtype) for new, old in zip(new_carry, carry, strict=True))
        return (c_BH, h_BH), h_BH

    return jax.lax.scan(step, carry, (inputs_TBE, keep_TB))


def trace_lstm(
    params: Params,
    carry: LayerCarry,
    inputs: jax.Array,
    *,
    keep_TB: jax.Array | None = None,
    norm_epsilon: float = NORM_EPSILON,
    dtype: Any = jnp.float32,
) -> tuple[LayerCarry, LayerStates]:
    """Run one LSTM layer over time and return every state and gate, by the plain equations.

    Arguments and states are those of flax_lstm.
    """
    params, carry, inputs = vary_alike((params, carry, inputs))
    input_kernel_EG, recurrent_kernel_HG = (
        concat_gates(params, side).astype(dtype) for side in "ih"
    )
    bias_1G = jnp.concatenate([params[f"h{gate}"]["bias"] for gate in GATES])[None].astype(dtype)

    def step(carry: LayerCarry, inputs: Any) -> tuple[LayerCarry, Any]:
        x_BE, keep_B = inputs
        c_BH, h_BH = (mask_rows(leaf_BH, keep_B) for leaf_BH in carry)
        x_BE, gated_h_BH = x_BE.astype(dtype), h_BH.astype(dtype)
        if "scale" in params:
            gated_h_BH = gated_h_BH * (1 + x_BE @ params["scale"]["kernel"].astype(dtype))
        product_BG = gated_h_BH @ recurrent_kernel_HG
        if "norm" in params:
            gain_1G = params["norm"]["gain"][None].astype(dtype)
            product_BG = product_BG * inverse_rms(product_BG, norm_epsilon) * gain_1G
        sums_BG = (x_BE @ input_kernel_EG + product_BG + bias_1G).astype(c_BH.dtype)
        i_BH, f_BH, g_BH, o_BH = jnp.split(sums_BG, 4, axis=-1)
        i_BH, f_BH, o_BH = map(jax.nn.sigmoid, (i_BH, f_BH, o_BH))
        g_BH = jnp.tanh(g_BH)
        c_BH = f_BH * c_BH + i_BH * g_BH
        h_BH = o_BH * jnp.tanh(c_BH)
        return (c_BH, h_BH), LayerStates(c_BH, h_BH, i_BH, f_BH, g_BH, o_BH)

    carry, states = jax.lax.scan(step, carry, (as_one_hot(params, inputs, dtype), keep_TB))
    return carry, LayerStates(*(leaf_TBH.swapaxes(0, 1) for leaf_TBH in states))


def expand_rank(leaf: jax.Array, like: jax.Array) -> jax.Array:
    """Return `leaf` with new leading axes, as many axes as `like` has."""
    return jnp.expand_dims(leaf, tuple(range(like.ndim - leaf.ndim)))


def vary_alike(tree: Any) -> Any:
    """Make all numeric leaves of `tree` vary over the same axes of jax.shard_map.

    Loop carries and custom gradients need this with `check_vma=True`: rows vary between devices;
    parameters and a zero carry do not. Outside shard_map `tree` is unchanged.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    zeros = [jnp.zeros_like(leaf, jnp.float32, ()) for leaf in jax.tree.leaves(tree)]
    zero = jnp.sum(jnp.stack(zeros))

    def vary(leaf: jax.Array) -> jax.Array:
        is_number = jnp.issubdtype(leaf.dtype, jnp.number)
        return leaf + zero.astype(leaf.dtype) if is_number else leaf

    return jax.tree.map(vary, tree)


def concat_gates(params: Params, side: str) -> jax.Array:
    """Concatenate the four kernels of the input ('i') or of the hidden state ('h')."""
    return jnp.concatenate([params[f"{side}{gate}"]["kernel"] for gate in GATES], axis=1)


def _with_gains(params: Params) -> Params:
    """Return the Flax cell's own parameters, with the gains multiplied into the kernels."""
    cell = {name: leaf for name, leaf in params.items() if name not in ("scale", "norm")}
    if "norm" not in params:
        return cell
    for gate, gain_H in zip(GATES, jnp.split(params["norm"]["gain"], 4), strict=True):
        kernel_HH = cell[f"h{gate}"]["kernel"]
        cell[f"h{gate}"] = cell[f"h{gate}"] | {"kernel": kernel_HH * expand_rank(gain_H, kernel_HH)}
    return cell


def inverse_rms(product_BG: jax.Array, epsilon: float) -> jax.Array:
    """Return the reciprocal root mean square of each row, inverse_rms_B1."""
    mean_B1 = jnp.mean(jnp.square(product_BG), axis=-1, keepdims=True)
    return jax.lax.rsqrt(mean_B1 + epsilon)


def are_integers(inputs: jax.Array) -> bool:
    """Return whether `inputs` are ids in place of one-hot vectors."""
    return jnp.issubdtype(inputs.dtype, jnp.integer)


def mask_rows(leaf_BH: jax.Array, keep_B: jax.Array | None) -> jax.Array:
    """Return `leaf_BH` with zeros in the rows where `keep_B` is False."""
    return leaf_BH if keep_B is None else jnp.where(keep_B[..., None], leaf_BH, 0)


def as_one_hot(params: Params, inputs: jax.Array, dtype: Any) -> jax.Array:
    """Return inputs_TBE, with ids as one-hot vectors."""
    if not are_integers(inputs):
        return inputs
    return jax.nn.one_hot(inputs, params["ii"]["kernel"].shape[0], dtype=dtype)
