"""The recurrence of flax_lstm with few, large products and a hand-written gradient.

README.md in this folder derives the gradient.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from charlstm.lstm.reference import (
    GATES,
    NORM_EPSILON,
    LayerCarry,
    Params,
    are_integers,
    concat_gates,
    expand_rank,
    inverse_rms,
    mask_rows,
    vary_alike,
)


class Weights(NamedTuple):
    """What the loop over time reads at every step; F are the 4H gates and, if any, the H scales."""

    kernel_HG: jax.Array
    rows_EF: jax.Array | None  # input part by id; None where the inputs are preactivations
    gain_G: jax.Array | None  # None without RMS norm


class LocalGrads(NamedTuple):
    """Derivatives within one time step."""

    by_sums_TBG: jax.Array  # of c by the sums of i, f and g, and of h by the sum of o
    dh_by_dc_TBH: jax.Array
    dc_by_c_before_TBH: jax.Array


class Residuals(NamedTuple):
    """What the backward pass reads of each time step."""

    ids_TB: jax.Array | None  # None where the inputs are preactivations
    scale_TBH: jax.Array | None  # None where it is looked up by id, or there is none
    keep_TB: jax.Array | None
    local_grads: LocalGrads
    normed: Any  # (normalised product_TBG, inverse_rms_TB1), or None without RMS norm


def fused_lstm(
    params: Params,
    carry: LayerCarry,
    inputs: jax.Array,
    *,
    keep_TB: jax.Array | None = None,
    mask_BH: jax.Array | None = None,
    norm_epsilon: float = NORM_EPSILON,
    dtype: Any = jnp.float32,
    num_shards: int = 1,
) -> tuple[LayerCarry, jax.Array]:
    """Run one LSTM layer over time with as few, as large matrix products as possible.

    Arguments, results and gradients are those of flax_lstm. Input vectors are multiplied by the
    input kernel once for all time steps; ids look up one row per time step.

    The gradient can be differentiated again in either mode: jax.grad(jax.grad(f)),
    jax.jvp(jax.grad(f)) and Hessian-vector products work. Forward mode on the function itself
    (jax.jvp(f), jax.linearize(f)) raises TypeError; use flax_lstm there.

    Residuals take six floats per B·T·H, the local derivatives, besides h, the result. Input vectors
    with `scale` add one float, `norm` adds four. jax.checkpoint around a single layer saves no
    memory.

    `num_shards` is the number of devices that share the rows. The gradient of the weights is then
    summed over time on each device first, and across devices once. With 1 on many devices, XLA
    adds them across devices after every chunk of time steps.
    """
    params, carry, inputs = vary_alike((params, carry, inputs))
    weights, inputs = fuse_weights(params, inputs, dtype)
    recur = partial(_recur, norm_epsilon, weights)
    if num_shards > 1 and inputs.shape[1] % num_shards == 0:
        return _recur_by_shards(recur, num_shards, carry, inputs, keep_TB, mask_BH)
    return recur(carry, inputs, keep_TB, mask_BH)


def fuse_weights(params: Params, inputs: jax.Array, dtype: Any) -> tuple[Weights, jax.Array]:
    """Return the weights of the loop over time, and its inputs: ids_TB or preact_TBF."""
    # sigmoid(s) = (1 + tanh(s / 2)) / 2: with halved sums one tanh serves all four gates.
    halve_G = jnp.repeat(jnp.array([0.5, 0.5, 1.0, 0.5], dtype), params["hi"]["bias"].size)
    input_kernel_EG = concat_gates(params, "i") * halve_G[None]
    recurrent_kernel_HG, gain_G = concat_gates(params, "h"), None
    if "norm" in params:
        gain_G = params["norm"]["gain"] * halve_G
    else:
        recurrent_kernel_HG *= halve_G[None]
    bias_F = jnp.concatenate([params[f"h{gate}"]["bias"] for gate in GATES]) * halve_G
    input_kernel_EF = input_kernel_EG
    if "scale" in params:
        # One lookup or product gives the preactivations and the scales.
        input_kernel_EF = jnp.concatenate([input_kernel_EG, params["scale"]["kernel"]], axis=1)
        bias_F = jnp.concatenate([bias_F, jnp.ones_like(params["hi"]["bias"])])
    rows_EF = None
    if are_integers(inputs):
        # There are fewer rows than time steps to add the bias to.
        rows_EF = (input_kernel_EF + bias_F[None]).astype(dtype)
    else:
        inputs = inputs.astype(dtype) @ input_kernel_EF.astype(dtype)
        inputs = inputs + expand_rank(bias_F.astype(dtype), inputs)
    return Weights(recurrent_kernel_HG.astype(dtype), rows_EF, gain_G), inputs


def _recur_by_shards(
    recur: Callable[..., Any],
    num_shards: int,
    carry: LayerCarry,
    inputs: jax.Array,
    keep_TB: jax.Array | None,
    mask_BH: jax.Array | None,
) -> tuple[LayerCarry, jax.Array]:
    """Apply `recur` to `num_shards` groups of rows independently, by jax.vmap."""
    num_steps, batch_size = inputs.shape[:2]

    def split(leaf: jax.Array, axis: int) -> jax.Array:
        return leaf.reshape(*leaf.shape[:axis], num_shards, -1, *leaf.shape[axis + 1 :])

    inputs, keep_TB = jax.tree.map(partial(split, axis=1), (inputs, keep_TB))
    carry, mask_BH = jax.tree.map(partial(split, axis=0), (carry, mask_BH))
    carry, hidden_TDBH = jax.vmap(recur, (0, 1, 1, 0), (0, 1))(carry, inputs, keep_TB, mask_BH)
    carry = jax.tree.map(lambda leaf_DBH: leaf_DBH.reshape(batch_size, -1), carry)
    return carry, hidden_TDBH.reshape(num_steps, batch_size, -1)


def differentiable(scan: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return recur(norm_epsilon, weights, carry, inputs, keep_TB, mask_BH) -> (carry, hidden_TBH).

    `inputs` are ids_TB of weights.rows_EF, or preact_TBF themselves. `scan` runs forward_scan or
    an equal function, and `backward` gives the gradient: backward_scan or an equal function.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def recur(norm_epsilon: float, weights: Weights, *given: Any) -> tuple[LayerCarry, jax.Array]:
        carry, (hidden_TBH, *_) = scan(norm_epsilon, False, weights, *given)
        return carry, hidden_TBH

    def forward(
        norm_epsilon: float,
        weights: Weights,
        carry: LayerCarry,
        inputs: jax.Array,
        keep_TB: jax.Array | None,
        mask_BH: jax.Array | None,
    ) -> tuple[tuple[LayerCarry, jax.Array], Any]:
        last_carry, (hidden_TBH, local_grads, normed) = scan(
            norm_epsilon, True, weights, carry, inputs, keep_TB, mask_BH
        )
        ids_TB = inputs if are_integers(inputs) else None
        scale_TBH = None if are_integers(inputs) else scale_of(inputs, hidden_TBH.shape[-1])
        steps = Residuals(ids_TB, scale_TBH, keep_TB, local_grads, normed)
        return (last_carry, hidden_TBH), (weights, carry[1], hidden_TBH, mask_BH, steps)

    def pull(norm_epsilon: float, residuals: Any, grads: Any) -> tuple[Any, ...]:
        del norm_epsilon  # inverse_rms contains it
        return *backward(residuals, grads), None, None

    recur.defvjp(forward, pull)
    return recur


def forward_scan(
    norm_epsilon: float,
    with_residuals: bool,
    weights: Weights,
    carry: LayerCarry,
    inputs: jax.Array,
    keep_TB: jax.Array | None,
    mask_BH: jax.Array | None,
) -> tuple[LayerCarry, Any]:
    """Return the last carry and (hidden_TBH, LocalGrads or None, normed or None)."""
    kernel_HG, rows_EF, gain_G = weights

    def step(carry: LayerCarry, inputs: Any) -> tuple[LayerCarry, Any]:
        inputs_B, keep_B = inputs
        c_before_BH, h_BH = (mask_rows(leaf_BH, keep_B) for leaf_BH in carry)
        # Looked up here and not for all time steps at once: the rows stay in the cache.
        preact_BF = inputs_B if rows_EF is None else rows_EF[inputs_B]
        gated_h_BH = multiply(h_BH, scale_of(preact_BF, h_BH.shape[-1]), mask_BH)
        product_BG = jnp.dot(
            gated_h_BH.astype(kernel_HG.dtype), kernel_HG, preferred_element_type=c_before_BH.dtype
        )
        normed = None
        if gain_G is not None:
            inverse_rms_B1 = inverse_rms(product_BG, norm_epsilon)
            normed = product_BG * inverse_rms_B1, inverse_rms_B1
            product_BG = normed[0] * gain_G[None]
        tanh_BG = jnp.tanh(preact_BF[..., : product_BG.shape[-1]] + product_BG)
        i_BH, f_BH, g_BH, o_BH = jnp.split(tanh_BG, 4, axis=-1)
        i_BH, f_BH, o_BH = ((1 + tanh_BH) / 2 for tanh_BH in (i_BH, f_BH, o_BH))
        c_BH = f_BH * c_before_BH + i_BH * g_BH
        tanh_c_BH = jnp.tanh(c_BH)
        h_BH = o_BH * tanh_c_BH
        if not with_residuals:
            return (c_BH, h_BH), (h_BH, None, None)
        factors_BG = jnp.concatenate([g_BH / 2, c_before_BH / 2, i_BH, tanh_c_BH / 2], axis=-1)
        dc_by_c_before_BH = mask_rows(f_BH, keep_B)
        local_grads = LocalGrads(
            (1 - tanh_BG**2) * factors_BG, o_BH * (1 - tanh_c_BH**2), dc_by_c_before_BH
        )
        return (c_BH, h_BH), (h_BH, local_grads, normed)

    return jax.lax.scan(step, carry, (inputs, keep_TB))


def scale_of(preact_XF: jax.Array, hidden_size: int) -> jax.Array | None:
    """Return scale_XH, the part after the four gates, or None without one; X are any axes."""
    scale_XH = preact_XF[..., 4 * hidden_size :]
    return scale_XH if scale_XH.shape[-1] else None


def multiply(h_XH: jax.Array, *factors: jax.Array | None) -> jax.Array:
    """Return `h_XH` times all factors that are not None; X are any axes."""
    arrays = (expand_rank(factor, h_XH) for factor in factors if factor is not None)
    return math.prod(arrays, start=h_XH)


def backward_scan(residuals: Any, grads: Any) -> tuple[Weights, LayerCarry, jax.Array | None]:
    """Return the gradients of the weights, the carry, and the inputs where they are no ids."""
    weights, h0_BH, hidden_TBH, mask_BH, steps = residuals
    carry_grad, hidden_grad_TBH = grads
    h_before_TBH = mask_rows(jnp.concatenate([h0_BH[None], hidden_TBH[:-1]]), steps.keep_TB)
    num_steps, batch_size = hidden_TBH.shape[:2]
    length = _chunk_length(num_steps, batch_size)
    # In chunks, to store the preactivations' gradients of a few time steps only.
    chunks = jax.tree.map(
        lambda leaf_T: leaf_T.reshape(num_steps // length, length, *leaf_T.shape[1:]),
        (hidden_grad_TBH, h_before_TBH, steps),
    )
    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, hidden_TBH.dtype), weights)
    (carry_grad, weights_grad), inputs_grad = jax.lax.scan(
        partial(_chunk_back, weights, mask_BH), (carry_grad, zeros), chunks, reverse=True
    )
    if inputs_grad is not None:
        inputs_grad = inputs_grad.reshape(num_steps, batch_size, -1)
    weights_grad = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), weights_grad, weights)
    return weights_grad, carry_grad, inputs_grad


def _chunk_back(
    weights: Weights,
    mask_BH: jax.Array | None,
    grads: tuple[LayerCarry, Weights],
    chunk: tuple[jax.Array, jax.Array, Residuals],
) -> tuple[tuple[LayerCarry, Weights], jax.Array | None]:
    """Go back over the t time steps of a chunk, and add to the gradients of the weights.

    Also return the gradient of the inputs, preact_grad_tBF, where they are preactivations.
    """
    carry_grad, (kernel_grad_HG, rows_grad_EF, gain_grad_G) = grads
    hidden_grad_tBH, h_before_tBH, steps = chunk
    kernel_HG, rows_EF, gain_G = weights
    hidden_size, dtype = len(kernel_HG), kernel_HG.dtype
    if rows_EF is not None and (scale_EH := scale_of(rows_EF, hidden_size)) is not None:
        steps = steps._replace(scale_TBH=scale_EH[steps.ids_TB])
    step_back = partial(_step_back, kernel_HG.T, gain_G, mask_BH)
    carry_grad, preact_grad_tBF = jax.lax.scan(
        step_back, carry_grad, (hidden_grad_tBH, h_before_tBH, steps), reverse=True
    )
    sums_grad_tBG = preact_grad_tBF[..., : 4 * hidden_size]
    product_grad_tBG = _product_grad(sums_grad_tBG, gain_G, steps.normed)
    gated_h_tBH = multiply(h_before_tBH, steps.scale_TBH, mask_BH)
    # One product over the rows of many time steps is faster than one per step.
    kernel_grad_HG += jnp.einsum(
        "tbh,tbg->hg",
        gated_h_tBH.astype(dtype),
        product_grad_tBG.astype(dtype),
        preferred_element_type=kernel_grad_HG.dtype,
    )
    if gain_grad_G is not None:
        normed_tBG, _ = steps.normed
        gain_grad_G += jnp.sum(sums_grad_tBG * normed_tBG, axis=(0, 1))
    if rows_EF is None:
        return (carry_grad, Weights(kernel_grad_HG, None, gain_grad_G)), preact_grad_tBF
    # A CPU adds in a sixth of the product's time; GPUs add in any order, and TPUs slowly.
    rows_grad_EF = jax.lax.platform_dependent(
        rows_grad_EF, steps.ids_TB, preact_grad_tBF, cpu=add_in_place, default=add_by_product
    )
    return (carry_grad, Weights(kernel_grad_HG, rows_grad_EF, gain_grad_G)), None


def _step_back(
    kernel_GH: jax.Array,
    gain_G: jax.Array | None,
    mask_BH: jax.Array | None,
    carry_grad: LayerCarry,
    step: tuple[jax.Array, jax.Array, Residuals],
) -> tuple[LayerCarry, jax.Array]:
    """Return the gradients of the carry before one time step and of its preactivations."""
    dc_BH, dh_BH = carry_grad
    hidden_grad_BH, h_before_BH, (_, scale_BH, keep_B, local_grads, normed) = step
    by_sums_BG, dh_by_dc_BH, dc_by_c_before_BH = local_grads
    dh_BH = dh_BH + hidden_grad_BH
    dc_BH = dc_BH + dh_BH * dh_by_dc_BH
    by_gate_BG = jnp.concatenate([dc_BH, dc_BH, dc_BH, dh_BH], axis=-1)
    sums_grad_BG = by_sums_BG * by_gate_BG
    preact_grad_BF = sums_grad_BG.astype(kernel_GH.dtype)
    # _chunk_back computes this again: XLA is slow at writing both gradients from this loop.
    product_grad_BG = _product_grad(sums_grad_BG, gain_G, normed).astype(kernel_GH.dtype)
    dh_BH = jnp.dot(product_grad_BG, kernel_GH, preferred_element_type=dc_BH.dtype)
    dh_BH = multiply(dh_BH, mask_BH)
    if scale_BH is not None:
        scale_grad_BH = (dh_BH * h_before_BH).astype(kernel_GH.dtype)
        preact_grad_BF = jnp.concatenate([preact_grad_BF, scale_grad_BH], axis=-1)
        dh_BH = dh_BH * scale_BH
    return (dc_BH * dc_by_c_before_BH, mask_rows(dh_BH, keep_B)), preact_grad_BF


def _product_grad(sums_grad_XG: jax.Array, gain_G: jax.Array | None, normed: Any) -> jax.Array:
    """Return the gradient of the recurrent products from that of the sums; X are any axes."""
    if gain_G is None:
        return sums_grad_XG
    normed_XG, inverse_rms_X1 = normed
    grad_XG = sums_grad_XG * expand_rank(gain_G, sums_grad_XG)
    along_X1 = jnp.mean(grad_XG * normed_XG, axis=-1, keepdims=True)
    return inverse_rms_X1 * (grad_XG - normed_XG * along_X1)


def add_in_place(rows_EF: jax.Array, ids_TB: jax.Array, values_TBF: jax.Array) -> jax.Array:
    """Return `rows_EF` with each value added to the row of its id."""
    return rows_EF.at[ids_TB].add(values_TBF.astype(rows_EF.dtype))


def add_by_product(rows_EF: jax.Array, ids_TB: jax.Array, values_TBF: jax.Array) -> jax.Array:
    """Return the result of add_in_place, by a product with one-hot vectors."""
    one_hot_TBE = jax.nn.one_hot(ids_TB, rows_EF.shape[0], dtype=values_TBF.dtype)
    return rows_EF + jnp.einsum(
        "tbe,tbf->ef", one_hot_TBE, values_TBF, preferred_element_type=rows_EF.dtype
    )


def _chunk_length(num_steps: int, batch_size: int) -> int:
    """Return the smallest divisor of T that gives the kernel gradient's product 1,024 rows.

    It is T where jax.export is to serve any T or B.
    """
    if is_symbolic_dim(num_steps) or is_symbolic_dim(batch_size):
        return num_steps
    divisors = (n for n in range(1, num_steps) if num_steps % n == 0 and n * batch_size >= 1024)
    return next(divisors, num_steps)


_recur = differentiable(forward_scan, backward_scan)
