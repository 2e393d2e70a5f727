"""The recurrence of flax_lstm with few, large products and a hand-written gradient.

README.md in this folder derives the gradient.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from charlstm.lstm.backward import (
    GateInputs,
    Residuals,
    Weights,
    apply_gates,
    backward_scan,
    multiply,
    scale_of,
)
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
    with `scale` add one float, `norm` adds four. With dtype=bfloat16 they take five numbers of two
    bytes, with and without `norm`, besides h and the preactivations of input vectors; the backward
    pass computes the local derivatives again, and `hidden_TBH` is rounded to bfloat16, in the type
    of the carry. jax.checkpoint around a single layer saves no memory.

    `num_shards` is the number of devices that share the rows. The gradient of the weights is then
    summed over time on each device first, and across devices once. With 1 on many devices, XLA
    adds them across devices after every chunk of time steps.
    """
    params, carry, inputs = vary_alike((params, carry, inputs))
    weights, inputs = fuse_weights(params, inputs, dtype)
    recur = partial(_recur, norm_epsilon, weights)
    if num_shards > 1 and inputs.shape[1] % num_shards == 0:
        recur = partial(_recur_by_shards, recur, num_shards)
    carry, hidden_TBH = recur(carry, inputs, keep_TB, mask_BH)
    return carry, hidden_TBH.astype(carry[1].dtype)


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
        # In float32, in which the gradient of the bias is then summed over all rows.
        inputs = (inputs + expand_rank(bias_F, inputs)).astype(dtype)
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
        ids_TB = preact_TBF = scale_TBH = None
        if are_integers(inputs):
            ids_TB = inputs
        elif isinstance(local_grads, GateInputs) and normed is not None:
            preact_TBF = inputs
        else:
            scale_TBH = scale_of(inputs, hidden_TBH.shape[-1])
        steps = Residuals(ids_TB, preact_TBF, scale_TBH, keep_TB, local_grads, normed)
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
    """Return the last carry and (hidden_TBH, LocalGrads or GateInputs or None, normed or None)."""
    kernel_HG, rows_EF, gain_G = weights
    dtype = kernel_HG.dtype

    def step(carry: LayerCarry, inputs: Any) -> tuple[LayerCarry, Any]:
        inputs_B, keep_B = inputs
        c_before_BH, h_BH = (mask_rows(leaf_BH, keep_B) for leaf_BH in carry)
        # Looked up here and not for all time steps at once: the rows stay in the cache.
        preact_BF = inputs_B if rows_EF is None else rows_EF[inputs_B]
        gated_h_BH = multiply(h_BH, scale_of(preact_BF, h_BH.shape[-1]), mask_BH)
        product_BG = jnp.dot(
            gated_h_BH.astype(dtype), kernel_HG, preferred_element_type=c_before_BH.dtype
        )
        normed = None
        if gain_G is not None:
            inverse_rms_B1 = inverse_rms(product_BG, norm_epsilon)
            normed = product_BG * inverse_rms_B1, inverse_rms_B1
            product_BG = normed[0] * gain_G[None]
        sums_BG = preact_BF[..., : product_BG.shape[-1]] + product_BG
        c_BH, h_BH, local_grads = apply_gates(sums_BG, c_before_BH, keep_B)
        if not with_residuals:
            return (c_BH, h_BH), (h_BH.astype(dtype), None, None)
        if dtype != jnp.bfloat16:
            return (c_BH, h_BH), (h_BH.astype(dtype), local_grads, normed)
        # Not the gates themselves: a forget gate near 1 would be rounded to 1.
        rounded_BG = sums_BG.astype(dtype) if normed is None else None
        gate_inputs = GateInputs(rounded_BG, c_before_BH.astype(dtype))
        normed = None if normed is None else (normed[0].astype(dtype), normed[1])
        return (c_BH, h_BH), (h_BH.astype(dtype), gate_inputs, normed)

    return jax.lax.scan(step, carry, (inputs, keep_TB))


_recur = differentiable(forward_scan, backward_scan)
