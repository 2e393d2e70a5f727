"""The gradient of the fused recurrence: a loop back over time. README.md derives it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from charlstm.lstm.reference import LayerCarry, expand_rank, mask_rows

# The least number of rows of a chunk, time steps times sequences, on CPUs and elsewhere.
CPU_CHUNK_ROWS = 1024
CHUNK_ROWS = 4096


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


class GateInputs(NamedTuple):
    """What apply_gates computes LocalGrads from: a bfloat16 model keeps these, and rounds them."""

    sums_TBG: jax.Array | None  # None with RMS norm: they follow from the normalised products
    c_before_TBH: jax.Array


class Residuals(NamedTuple):
    """What the backward pass reads of each time step."""

    ids_TB: jax.Array | None  # None where the inputs are preactivations
    preact_TBF: jax.Array | None  # only with GateInputs and RMS norm, where there are no ids
    scale_TBH: jax.Array | None  # None where ids or preact_TBF give it, or there is none
    keep_TB: jax.Array | None
    local_grads: LocalGrads | GateInputs
    normed: Any  # (normalised product_TBG, inverse_rms_TB1), or None without RMS norm


def apply_gates(
    sums_BG: jax.Array, c_before_BH: jax.Array, keep_B: jax.Array | None
) -> tuple[jax.Array, jax.Array, LocalGrads]:
    """Return c_BH and h_BH after a time step, and their derivatives."""
    tanh_BG = jnp.tanh(sums_BG)
    i_BH, f_BH, g_BH, o_BH = jnp.split(tanh_BG, 4, axis=-1)
    i_BH, f_BH, o_BH = ((1 + tanh_BH) / 2 for tanh_BH in (i_BH, f_BH, o_BH))
    c_BH = f_BH * c_before_BH + i_BH * g_BH
    tanh_c_BH = jnp.tanh(c_BH)
    h_BH = o_BH * tanh_c_BH
    factors_BG = jnp.concatenate([g_BH / 2, c_before_BH / 2, i_BH, tanh_c_BH / 2], axis=-1)
    local_grads = LocalGrads(
        (1 - tanh_BG**2) * factors_BG, o_BH * (1 - tanh_c_BH**2), mask_rows(f_BH, keep_B)
    )
    return c_BH, h_BH, local_grads


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
    weights, *_ = residuals
    # On a CPU, the gradients of a chunk stay in the cache. Elsewhere each chunk reads and writes
    # the kernel's gradient in memory, which takes a TPU as long as the product of 1,000 rows.
    # A CPU adds rows in a sixth of the product's time; GPUs add in any order, and TPUs slowly.
    cpu = partial(_back_by_chunks, CPU_CHUNK_ROWS, add_in_place)
    has_ids = weights.rows_EF is not None
    default = partial(_back_by_chunks, CHUNK_ROWS, add_by_product) if has_ids else _back_at_once
    return jax.lax.platform_dependent(residuals, grads, cpu=cpu, default=default)


def _back_by_chunks(
    num_rows: int, add_rows: Callable[..., jax.Array], residuals: Any, grads: Any
) -> tuple[Weights, LayerCarry, jax.Array | None]:
    """Return the result of backward_scan; store the gradients of a chunk of time steps only."""
    weights, h0_BH, hidden_TBH, mask_BH, steps = residuals
    carry_grad, hidden_grad_TBH = grads
    step_back = partial(_step_back, _transpose(weights), mask_BH)

    def chunk_back(so_far: tuple[LayerCarry, Weights], chunk: Any) -> tuple[Any, Any]:
        carry_grad, weights_grad = so_far
        h0_BH, hidden_tBH, steps, hidden_grad_tBH = chunk
        h_before_tBH = mask_rows(jnp.concatenate([h0_BH[None], hidden_tBH[:-1]]), steps.keep_TB)
        carry_grad, preact_grad_tBF = jax.lax.scan(
            step_back, carry_grad, (hidden_grad_tBH, h_before_tBH, steps), reverse=True
        )
        weights_grad = _add_chunk(
            add_rows, weights, mask_BH, weights_grad, (preact_grad_tBF, h_before_tBH, steps)
        )
        return (carry_grad, weights_grad), preact_grad_tBF if weights.rows_EF is None else None

    chunks = _split(num_rows, h0_BH, hidden_TBH, steps, hidden_grad_TBH)
    so_far = carry_grad, _zeros_like(weights, carry_grad)
    (carry_grad, weights_grad), inputs_grad = jax.lax.scan(chunk_back, so_far, chunks, reverse=True)
    if inputs_grad is not None:
        inputs_grad = inputs_grad.reshape(*hidden_TBH.shape[:2], -1)
    return _cast_like(weights_grad, weights), carry_grad, inputs_grad


def _back_at_once(residuals: Any, grads: Any) -> tuple[Weights, LayerCarry, jax.Array | None]:
    """Return the result of backward_scan for preactivations, whose gradient is stored anyway.

    The loop over all time steps reads the residuals in place; XLA would copy chunks of them.
    """
    weights, h0_BH, hidden_TBH, mask_BH, steps = residuals
    carry_grad, hidden_grad_TBH = grads
    transposed = _transpose(weights)

    def step_back(carry_grad: LayerCarry, step: Any) -> tuple[LayerCarry, jax.Array]:
        t, hidden_grad_BH, saved = step
        h_before_BH = jnp.where(t == 0, h0_BH.astype(hidden_TBH.dtype), hidden_TBH[t - 1])
        h_before_BH = mask_rows(h_before_BH, saved.keep_TB)
        return _step_back(transposed, mask_BH, carry_grad, (hidden_grad_BH, h_before_BH, saved))

    def add_chunk(weights_grad: Weights, chunk: Any) -> tuple[Weights, None]:
        h0_BH, hidden_tBH, steps, preact_grad_tBF = chunk
        h_before_tBH = mask_rows(jnp.concatenate([h0_BH[None], hidden_tBH[:-1]]), steps.keep_TB)
        chunk = preact_grad_tBF, h_before_tBH, steps
        return _add_chunk(None, weights, mask_BH, weights_grad, chunk), None

    times_T = jnp.arange(hidden_TBH.shape[0])
    carry_grad, preact_grad_TBF = jax.lax.scan(
        step_back, carry_grad, (times_T, hidden_grad_TBH, steps), reverse=True
    )
    # A slice of each chunk is slower: XLA transposes the whole chunk of the preactivations.
    scale_TBH = _find_scale(None, hidden_TBH.shape[-1], steps)
    steps = steps._replace(preact_TBF=None, scale_TBH=scale_TBH)
    chunks = _split(CHUNK_ROWS, h0_BH, hidden_TBH, steps, preact_grad_TBF)
    weights_grad, _ = jax.lax.scan(add_chunk, _zeros_like(weights, carry_grad), chunks)
    return _cast_like(weights_grad, weights), carry_grad, preact_grad_TBF


def _split(num_rows: int, h0_BH: jax.Array, hidden_TBH: jax.Array, *trees_T: Any) -> Any:
    """Return (h0_CBH, hidden_CtBH, *trees_CtX): C chunks of time, of at least `num_rows` rows.

    h0_CBH is the hidden state before each chunk.
    """
    num_steps, batch_size = hidden_TBH.shape[:2]
    length = _chunk_length(num_steps, batch_size, num_rows)
    hidden_CtBH, *trees = jax.tree.map(
        lambda leaf_T: leaf_T.reshape(num_steps // length, length, *leaf_T.shape[1:]),
        (hidden_TBH, *trees_T),
    )
    h0_CBH = jnp.concatenate([h0_BH[None].astype(hidden_TBH.dtype), hidden_CtBH[:-1, -1]])
    return h0_CBH, hidden_CtBH, *trees


def _transpose(weights: Weights) -> Weights:
    return weights._replace(kernel_HG=weights.kernel_HG.T)


def _zeros_like(weights: Weights, carry_grad: LayerCarry) -> Weights:
    """Return zeros to add the gradient of `weights` to, in the type of the carry."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, carry_grad[0].dtype), weights)


def _cast_like(weights_grad: Weights, weights: Weights) -> Weights:
    return jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), weights_grad, weights)


def _add_chunk(
    add_rows: Callable[..., jax.Array] | None,
    weights: Weights,
    mask_BH: jax.Array | None,
    weights_grad: Weights,
    chunk: tuple[jax.Array, jax.Array, Residuals],
) -> Weights:
    """Return `weights_grad` with the contribution of the t time steps of a chunk added."""
    kernel_grad_HG, rows_grad_EF, gain_grad_G = weights_grad
    preact_grad_tBF, h_before_tBH, steps = chunk
    kernel_HG, rows_EF, gain_G = weights
    sums_grad_tBG = preact_grad_tBF[..., : kernel_HG.shape[1]]
    product_grad_tBG = _product_grad(sums_grad_tBG, gain_G, steps.normed)
    gated_h_tBH = multiply(h_before_tBH, _find_scale(rows_EF, len(kernel_HG), steps), mask_BH)
    # One product over the rows of many time steps is faster than one per step.
    kernel_grad_HG += jnp.einsum(
        "tbh,tbg->hg",
        gated_h_tBH.astype(kernel_HG.dtype),
        product_grad_tBG.astype(kernel_HG.dtype),
        preferred_element_type=kernel_grad_HG.dtype,
    )
    if gain_grad_G is not None:
        normed_tBG, _ = steps.normed
        gain_grad_G += jnp.sum(sums_grad_tBG * normed_tBG.astype(gain_grad_G.dtype), axis=(0, 1))
    if add_rows is not None and rows_EF is not None:
        rows_grad_EF = add_rows(rows_grad_EF, steps.ids_TB, preact_grad_tBF)
    return Weights(kernel_grad_HG, rows_grad_EF, gain_grad_G)


def _step_back(
    weights: Weights,
    mask_BH: jax.Array | None,
    carry_grad: LayerCarry,
    step: tuple[jax.Array, jax.Array, Residuals],
) -> tuple[LayerCarry, jax.Array]:
    """Return the gradients of the carry before one time step and of its preactivations."""
    dc_BH, dh_BH = carry_grad
    hidden_grad_BH, h_before_BH, saved = step
    kernel_GH, rows_EF, gain_G = weights
    _, _, _, keep_B, local_grads, normed = saved
    if isinstance(local_grads, GateInputs):
        local_grads = _compute_again(rows_EF, gain_G, saved, dc_BH.dtype)
    by_sums_BG, dh_by_dc_BH, dc_by_c_before_BH = local_grads
    dh_BH = dh_BH + hidden_grad_BH
    dc_BH = dc_BH + dh_BH * dh_by_dc_BH
    by_gate_BG = jnp.concatenate([dc_BH, dc_BH, dc_BH, dh_BH], axis=-1)
    sums_grad_BG = by_sums_BG * by_gate_BG
    preact_grad_BF = sums_grad_BG.astype(kernel_GH.dtype)
    # _add_chunk computes this again: XLA is slow at writing both gradients from this loop.
    product_grad_BG = _product_grad(sums_grad_BG, gain_G, normed).astype(kernel_GH.dtype)
    dh_BH = jnp.dot(product_grad_BG, kernel_GH, preferred_element_type=dc_BH.dtype)
    dh_BH = multiply(dh_BH, mask_BH)
    scale_BH = _find_scale(rows_EF, dh_BH.shape[-1], saved)
    if scale_BH is not None:
        scale_grad_BH = (dh_BH * h_before_BH).astype(kernel_GH.dtype)
        preact_grad_BF = jnp.concatenate([preact_grad_BF, scale_grad_BH], axis=-1)
        dh_BH = dh_BH * scale_BH
    return (dc_BH * dc_by_c_before_BH, mask_rows(dh_BH, keep_B)), preact_grad_BF


def _find_scale(rows_EF: jax.Array | None, hidden_size: int, steps: Residuals) -> Any:
    """Return the scales of one time step or more, or None without any."""
    if rows_EF is not None:
        scale_EH = scale_of(rows_EF, hidden_size)
        return None if scale_EH is None else scale_EH[steps.ids_TB]
    if steps.preact_TBF is not None:
        return scale_of(steps.preact_TBF, hidden_size)
    return steps.scale_TBH


def _compute_again(
    rows_EF: jax.Array | None, gain_G: jax.Array | None, saved: Any, dtype: Any
) -> LocalGrads:
    """Return the local derivatives of one time step from its Residuals."""
    sums_BG, c_before_BH = saved.local_grads
    if gain_G is not None:
        preact_BF = saved.preact_TBF if rows_EF is None else rows_EF[saved.ids_TB]
        sums_BG = preact_BF[..., : gain_G.size] + saved.normed[0] * gain_G[None]
    return apply_gates(sums_BG.astype(dtype), c_before_BH.astype(dtype), saved.keep_TB)[2]


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


def _chunk_length(num_steps: int, batch_size: int, num_rows: int) -> int:
    """Return the smallest divisor of T that makes chunks of at least `num_rows` rows, or T.

    It is T where jax.export is to serve any T or B.
    """
    if is_symbolic_dim(num_steps) or is_symbolic_dim(batch_size):
        return num_steps
    divisors = (n for n in range(1, num_steps) if num_steps % n == 0 and n * batch_size >= num_rows)
    return next(divisors, num_steps)
