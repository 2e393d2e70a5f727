"""The recurrence of flax_lstm with few, large products and a hand-written gradient."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from charlstm.lstm.reference import (
    GATES,
    NORM_EPSILON,
    LayerCarry,
    Params,
    aligned,
    are_integers,
    concat_gates,
    inverse_rms,
    kept_rows,
    vary_alike,
)

# kernel_HG, rows_EF, and gain_G where the gates' products are normalised. F are the four gates, and
# then perhaps the H scales.
Weights = tuple[jax.Array, jax.Array, jax.Array | None]


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

    Arguments, result and gradients are those of flax_lstm. The gradient itself can be
    differentiated, in either mode: jax.grad(jax.grad(f)) and jax.jvp(jax.grad(f)) work, and so do
    Hessian-vector products. Forward mode on the function itself does not: jax.jvp(f),
    jax.linearize(f) and jax.grad of them raise, and need flax_lstm. What reaches the gates from
    vectors is one product for all time steps, and from ids a row looked up at each.

    Differentiation keeps 7 floats per B·T·H, six local derivatives and h, an eighth where vectors
    scale the hidden state, and four where sums are normalised. Under jax.checkpoint it keeps them
    during the backward pass only, which for a single layer saves nothing.

    `num_shards` is the number of devices that share the rows. The gradient of the
    weights is then summed over time for the rows of each apart, and once over all. Otherwise XLA
    would let the devices add theirs up at every chunk of time steps.
    """
    params, carry, inputs = vary_alike((params, carry, inputs))
    # Since sigmoid(s) = (1 + tanh(s / 2)) / 2, with halved sums one tanh serves all four gates.
    halve_G = jnp.repeat(jnp.array([0.5, 0.5, 1.0, 0.5], dtype), carry[0].shape[-1])
    input_kernel_EG = concat_gates(params, "i") * halve_G[None]
    recurrent_kernel_HG, gain_G = concat_gates(params, "h"), None
    if "norm" in params:
        gain_G = params["norm"]["gain"] * halve_G
    else:
        recurrent_kernel_HG *= halve_G[None]
    bias_F = jnp.concatenate([params[f"h{gate}"]["bias"] for gate in GATES]) * halve_G
    input_kernel_EF = input_kernel_EG
    if "scale" in params:
        # Scales are looked up, or computed, as what drives the gates is, and beside it.
        input_kernel_EF = jnp.concatenate([input_kernel_EG, params["scale"]["kernel"]], axis=1)
        bias_F = jnp.concatenate([bias_F, jnp.ones_like(params["hi"]["bias"])])
    if are_integers(inputs):
        # The bias joins the rows that are looked up, which are fewer than the time steps.
        rows_EF = (input_kernel_EF + bias_F[None]).astype(dtype)
    else:
        rows_EF = jnp.zeros((0, bias_F.size), dtype)
        inputs = inputs.astype(dtype) @ input_kernel_EF.astype(dtype)
        inputs = inputs + aligned(bias_F.astype(dtype), inputs)
    recur = partial(_recur, norm_epsilon, (recurrent_kernel_HG.astype(dtype), rows_EF, gain_G))
    return _by_shards(recur, num_shards)(carry, inputs, keep_TB, mask_BH)


def _scan(
    norm_epsilon: float,
    weights: Weights,
    carry: LayerCarry,
    inputs: jax.Array,
    keep_TB: jax.Array | None,
    mask_BH: jax.Array | None,
    with_slopes: bool,
) -> tuple[LayerCarry, Any]:
    kernel_HG, rows_EF, gain_G = weights

    def step(carry: LayerCarry, given: Any) -> tuple[LayerCarry, Any]:
        inputs_B, keep_B = given
        c_before_BH, h_BH = (kept_rows(leaf_BH, keep_B) for leaf_BH in carry)
        # Looked up here, where it stays in the cache, and not for all time steps before.
        preact_BF = rows_EF[inputs_B] if are_integers(inputs) else inputs_B
        gated_h_BH = _product(h_BH, _scale(preact_BF, h_BH.shape[-1]), mask_BH)
        product_BG = jnp.dot(
            gated_h_BH.astype(kernel_HG.dtype), kernel_HG, preferred_element_type=c_before_BH.dtype
        )
        normed = None
        if gain_G is not None:
            root_B1 = inverse_rms(product_BG, norm_epsilon)
            normed = product_BG * root_B1, root_B1
            product_BG = normed[0] * gain_G[None]
        tanh_BG = jnp.tanh(preact_BF[..., : product_BG.shape[-1]] + product_BG)
        i_BH, f_BH, g_BH, o_BH = jnp.split(tanh_BG, 4, axis=-1)
        i_BH, f_BH, o_BH = ((1 + tanh_BH) / 2 for tanh_BH in (i_BH, f_BH, o_BH))
        c_BH = f_BH * c_before_BH + i_BH * g_BH
        tanh_c_BH = jnp.tanh(c_BH)
        h_BH = o_BH * tanh_c_BH
        if not with_slopes:
            return (c_BH, h_BH), (h_BH,)
        factors_BG = jnp.concatenate([g_BH / 2, c_before_BH / 2, i_BH, tanh_c_BH / 2], axis=-1)
        dc_by_dc_BH = kept_rows(f_BH, keep_B)
        local_grads = (1 - tanh_BG**2) * factors_BG, o_BH * (1 - tanh_c_BH**2), dc_by_dc_BH
        return (c_BH, h_BH), (h_BH, local_grads, normed)

    return jax.lax.scan(step, carry, (inputs, keep_TB))


def _scale(drive_XF: jax.Array, hidden_size: int) -> jax.Array | None:
    """Return scale_XH, which stands behind the four gates, if it does; X are any other axes."""
    scale_XH = drive_XF[..., 4 * hidden_size :]
    return scale_XH if scale_XH.shape[-1] else None


def _product(h_XH: jax.Array, *factors: jax.Array | None) -> jax.Array:
    """Return `h_XH` times the factors that there are; X are any other axes."""
    there = (aligned(factor, h_XH) for factor in factors if factor is not None)
    return math.prod(there, start=h_XH)


def _by_shards(recur: Callable[..., Any], num_shards: int) -> Callable[..., Any]:
    """Return recur of the same arguments, for groups of rows that know nothing of another."""

    def recur_by_shards(carry: LayerCarry, inputs: jax.Array, keep_TB: Any, mask_BH: Any) -> Any:
        batch_size = inputs.shape[1]
        if num_shards == 1 or batch_size % num_shards:
            return recur(carry, inputs, keep_TB, mask_BH)

        def cut(leaf: jax.Array, axis: int) -> jax.Array:
            return leaf.reshape(*leaf.shape[:axis], num_shards, -1, *leaf.shape[axis + 1 :])

        over_time = jax.tree.map(partial(cut, axis=1), (inputs, keep_TB))
        by_rows, mask_DBH = jax.tree.map(partial(cut, axis=0), (carry, mask_BH))
        shards = by_rows, *over_time, mask_DBH
        carry, hidden_TDBH = jax.vmap(recur, (0, 1, 1, 0), (0, 1))(*shards)
        carry = jax.tree.map(lambda leaf_DBH: leaf_DBH.reshape(batch_size, -1), carry)
        return carry, hidden_TDBH.reshape(*inputs.shape[:2], -1)

    return recur_by_shards


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recur(
    norm_epsilon: float,
    weights: Weights,
    carry: LayerCarry,
    inputs: jax.Array,
    keep_TB: jax.Array | None,
    mask_BH: jax.Array | None,
) -> tuple[LayerCarry, jax.Array]:
    """Run the recurrence on halved sums; `inputs` are ids_TB of rows_EF, or drive_TBF itself."""
    given = carry, inputs, keep_TB, mask_BH
    carry, (hidden_TBH,) = _scan(norm_epsilon, weights, *given, with_slopes=False)
    return carry, hidden_TBH


def _recur_forward(
    norm_epsilon: float,
    weights: Weights,
    carry: LayerCarry,
    inputs: jax.Array,
    keep_TB: jax.Array | None,
    mask_BH: jax.Array | None,
) -> tuple[tuple[LayerCarry, jax.Array], Any]:
    last_carry, (hidden_TBH, local_grads, normed) = _scan(
        norm_epsilon, weights, carry, inputs, keep_TB, mask_BH, with_slopes=True
    )
    h_before_TBH = kept_rows(jnp.concatenate([carry[1][None], hidden_TBH[:-1]]), keep_TB)
    # The backward pass reads only the scales of what drives the gates, a fifth of it.
    given = inputs if are_integers(inputs) else _scale(inputs, carry[1].shape[-1])
    kept = given, keep_TB, mask_BH, h_before_TBH, local_grads, normed
    return (last_carry, hidden_TBH), (weights, kept)


def _recur_backward(norm_epsilon: float, residuals: Any, grads: Any) -> tuple[Any, ...]:
    del norm_epsilon  # it is in the root that was kept
    weights, (given, keep_TB, mask_BH, h_before_TBH, local_grads, normed) = residuals
    kernel_HG, rows_EF, gain_G = weights
    last_carry_grad, hidden_grad_TBH = grads
    num_steps, batch_size, hidden_size = h_before_TBH.shape
    dtype = kernel_HG.dtype
    is_lookup = rows_EF.shape[0] > 0  # otherwise `given` is scale_TBH, or None
    scale_EH = _scale(rows_EF, hidden_size)
    step = partial(_step_back, kernel_HG.T, gain_G, mask_BH)

    def chunk_step(state: Any, chunk: Any) -> tuple[Any, jax.Array | None]:
        carry_grad, kernel_grad_HG, rows_grad_EF, gain_grad_G = state
        *kept, h_before_tBH, given_tB = chunk
        # Of None there are no rows.
        scale_tBH = jax.tree.map(lambda s: s[given_tB], scale_EH) if is_lookup else given_tB
        kept = *kept, scale_tBH, h_before_tBH
        carry_grad, drive_grad_tBF = jax.lax.scan(step, carry_grad, kept, reverse=True)
        sums_grad_tBG = drive_grad_tBF[..., : kernel_HG.shape[-1]]
        product_grad_tBG = _product_grad(sums_grad_tBG, gain_G, kept[2])
        gated_h_tBH = _product(h_before_tBH, scale_tBH, mask_BH)
        # One product over the rows of many time steps, where step would add small ones.
        kernel_grad_HG += jnp.einsum(
            "tbh,tbg->hg",
            gated_h_tBH.astype(dtype),
            product_grad_tBG.astype(dtype),
            preferred_element_type=kernel_grad_HG.dtype,
        )
        if gain_grad_G is not None:
            normed_tBG = kept[2][0]
            gain_grad_G += jnp.sum(sums_grad_tBG * normed_tBG, axis=(0, 1))
        if not is_lookup:
            return (carry_grad, kernel_grad_HG, rows_grad_EF, gain_grad_G), drive_grad_tBF
        # On CPUs adding takes a sixth of the product's time; on GPUs its order is left to chance,
        # and TPUs are slow at it.
        rows_grad_EF = jax.lax.platform_dependent(
            rows_grad_EF, given_tB, drive_grad_tBF, cpu=add_in_place, default=add_by_product
        )
        return (carry_grad, kernel_grad_HG, rows_grad_EF, gain_grad_G), None

    # In chunks, so that the gradient of the sums need not be kept for all time steps.
    length = _chunk_length(num_steps, batch_size)
    chunks = jax.tree.map(
        lambda leaf_T: leaf_T.reshape(num_steps // length, length, *leaf_T.shape[1:]),
        (hidden_grad_TBH, local_grads, normed, keep_TB, h_before_TBH, given),
    )
    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, h_before_TBH.dtype), weights)
    (carry_grad, *grads_of_weights), inputs_grad = jax.lax.scan(
        chunk_step, (last_carry_grad, *zeros), chunks, reverse=True
    )
    if inputs_grad is not None:
        inputs_grad = inputs_grad.reshape(num_steps, batch_size, -1)
    weights_grad = jax.tree.map(
        lambda grad, leaf: grad.astype(leaf.dtype), tuple(grads_of_weights), weights
    )
    return weights_grad, carry_grad, inputs_grad, None, None


def _step_back(
    kernel_GH: jax.Array,
    gain_G: jax.Array | None,
    mask_BH: jax.Array | None,
    carry_grad: LayerCarry,
    kept: Any,
) -> tuple[LayerCarry, Any]:
    """Return the gradient of the carry before a time step, and that of what drives its gates."""
    dc_BH, dh_BH = carry_grad
    hidden_grad_BH, local_grads, normed, keep_B, scale_BH, h_before_BH = kept
    local_grads_BG, dh_by_dc_BH, dc_by_dc_BH = local_grads
    dh_BH = dh_BH + hidden_grad_BH
    dc_BH = dc_BH + dh_BH * dh_by_dc_BH
    by_gate_BG = jnp.concatenate([dc_BH, dc_BH, dc_BH, dh_BH], axis=-1)
    sums_grad_BG = local_grads_BG * by_gate_BG
    preact_grad_BF = sums_grad_BG.astype(kernel_GH.dtype)
    # Found once more for many time steps, since XLA is slow at writing it beside the sums' here.
    product_grad_BG = _product_grad(sums_grad_BG, gain_G, normed).astype(kernel_GH.dtype)
    dh_BH = jnp.dot(product_grad_BG, kernel_GH, preferred_element_type=dc_BH.dtype)
    dh_BH = _product(dh_BH, mask_BH)
    if scale_BH is not None:
        scale_grad_BH = (dh_BH * h_before_BH).astype(kernel_GH.dtype)
        preact_grad_BF = jnp.concatenate([preact_grad_BF, scale_grad_BH], axis=-1)
        dh_BH = dh_BH * scale_BH
    return (dc_BH * dc_by_dc_BH, kept_rows(dh_BH, keep_B)), preact_grad_BF


def _product_grad(sums_grad_XG: jax.Array, gain_G: jax.Array | None, normed: Any) -> jax.Array:
    """Return the gradient of the recurrent products, given that of the sums; X are any axes."""
    if gain_G is None:
        return sums_grad_XG
    normed_XG, root_X1 = normed
    grad_XG = sums_grad_XG * aligned(gain_G, sums_grad_XG)
    along_X1 = jnp.mean(grad_XG * normed_XG, axis=-1, keepdims=True)
    return root_X1 * (grad_XG - normed_XG * along_X1)


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
