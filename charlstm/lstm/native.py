"""The recurrence of fused_lstm with its loops over time in C++, for float32 on a CPU.

native_library compiles native.cc when a program first needs it. Programs that cannot run it contain
the loops of fused_lstm instead: see _is_supported and _is_local.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from charlstm.lstm.backward import LocalGrads, Weights, backward_scan, scale_of
from charlstm.lstm.fused import differentiable, forward_scan, fuse_weights, fused_lstm
from charlstm.lstm.native_library import load
from charlstm.lstm.reference import NORM_EPSILON, LayerCarry, Params, are_integers

PANEL = 32  # columns that native.cc reads together; it takes multiples of it as hidden sizes
MIN_STEPS = 4  # for fewer time steps, packing the recurrent kernel costs more than it saves


def native_lstm(
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
    """Run one LSTM layer over time in C++.

    Arguments, results and gradients are those of fused_lstm, up to rounding, and do not depend on
    the number of threads. The gradient cannot be differentiated.

    The same program uses fused_lstm for other types than float32, fewer than MIN_STEPS time steps
    (generation), no rows, num_shards > 1, jax.shard_map, other platforms than CPUs, several
    devices, and jax.export.

    Raises:
      UserError: when a program is compiled for a CPU and there is no working C++ compiler.
    """
    if not _is_supported(params, carry, inputs, dtype, num_shards):
        return fused_lstm(
            params,
            carry,
            inputs,
            keep_TB=keep_TB,
            mask_BH=mask_BH,
            norm_epsilon=norm_epsilon,
            dtype=dtype,
            num_shards=num_shards,
        )
    hidden_size = carry[0].shape[-1]
    padded_size = -(-hidden_size // PANEL) * PANEL
    pad = partial(_pad_units, hidden_size, padded_size)
    weights, inputs = fuse_weights(params, inputs, dtype)
    kernel_HG, rows_EF, gain_G = jax.tree.map(pad, weights)
    kernel_HG = pad(kernel_HG.T).T
    if gain_G is not None:
        # The zeros make the mean square of a row smaller.
        share = hidden_size / padded_size
        gain_G, norm_epsilon = gain_G * math.sqrt(share), norm_epsilon * share
    carry, mask_BH = jax.tree.map(pad, (carry, mask_BH))
    inputs = inputs.astype(jnp.int32) if are_integers(inputs) else pad(inputs)
    weights = Weights(kernel_HG, rows_EF, gain_G)
    result = _recur(float(norm_epsilon), weights, carry, inputs, keep_TB, mask_BH)
    return jax.tree.map(lambda leaf: leaf[..., :hidden_size], result)


def _is_supported(
    params: Params, carry: LayerCarry, inputs: jax.Array, dtype: Any, num_shards: int
) -> bool:
    """Return whether native.cc computes this: a decision at trace time."""
    floats = jax.tree.leaves((params, carry, () if are_integers(inputs) else inputs))
    is_float32 = all(jnp.dtype(t) == jnp.float32 for t in (dtype, *(x.dtype for x in floats)))
    in_shard_map = bool(jax.sharding.get_abstract_mesh().manual_axes)
    num_steps, batch_size = inputs.shape[:2]
    is_long = num_steps >= MIN_STEPS and batch_size > 0
    return is_float32 and num_shards == 1 and not in_shard_map and is_long


def _pad_units(hidden_size: int, padded_size: int, leaf_XF: jax.Array) -> jax.Array:
    """Return `leaf_XF` with zeros after every H entries of its last axis."""
    *shape, size = leaf_XF.shape
    num_groups = size // hidden_size
    groups = leaf_XF.reshape(*shape, num_groups, hidden_size)
    widths = [(0, 0)] * (groups.ndim - 1) + [(0, padded_size - hidden_size)]
    return jnp.pad(groups, widths).reshape(*shape, num_groups * padded_size)


# --- the loops ---


def _forward_native(
    norm_epsilon: float,
    with_residuals: bool,
    weights: Weights,
    carry: LayerCarry,
    inputs: jax.Array,
    keep_TB: jax.Array | None,
    mask_BH: jax.Array | None,
) -> tuple[LayerCarry, Any]:
    """Return what forward_scan returns."""
    kernel_HG, rows_NF, gain_G = weights
    (t, b), h = inputs.shape[:2], len(kernel_HG)
    ids_TB = None if rows_NF is None else inputs
    rows_NF = inputs.reshape(t * b, -1) if rows_NF is None else rows_NF
    r = t if with_residuals else 0
    n = r if gain_G is not None else 0
    shapes = (t, b, h), (b, h), (r, b, 4 * h), (r, b, h), (r, b, h), (n, b, 4 * h), (n, b, 1)
    hidden_TBH, c_BH, *saved, normed_TBG, inverse_rms_TB1 = _call(
        "Forward",
        shapes,
        (t, b, h, *reversed(rows_NF.shape)),
        (ids_TB, keep_TB, mask_BH, gain_G, _pack_gates(kernel_HG), rows_NF, *carry),
        norm_epsilon,
    )
    local_grads = LocalGrads(*saved) if with_residuals else None
    normed = (normed_TBG, inverse_rms_TB1) if n else None
    return (c_BH, hidden_TBH[-1]), (hidden_TBH, local_grads, normed)


def _backward_native(residuals: Any, grads: Any) -> tuple[Weights, LayerCarry, jax.Array | None]:
    """Return what backward_scan returns."""
    (kernel_HG, rows_EF, gain_G), h0_BH, hidden_TBH, mask_BH, steps = residuals
    carry_grad, hidden_grad_TBH = grads
    t, b, h = hidden_TBH.shape
    has_rows = rows_EF is not None
    scale_NH = scale_of(rows_EF, h) if has_rows else steps.scale_TBH
    scale_NH = None if scale_NH is None else scale_NH.reshape(-1, h)
    rows_shape = rows_EF.shape if has_rows else (t * b, (4 if scale_NH is None else 5) * h)
    gain_shape = (0 if gain_G is None else 4 * h,)
    options = steps.ids_TB, steps.keep_TB, mask_BH, gain_G, _pack_units(kernel_HG), scale_NH
    saved = h0_BH, hidden_TBH, *steps.local_grads, *(steps.normed or (None, None))
    gated_h_TBH, product_grad_TBG, rows_grad_NF, gain_grad_G, dc_BH, dh_BH = _call(
        "Backward",
        ((t, b, h), (t, b, 4 * h), rows_shape, gain_shape, (b, h), (b, h)),
        (t, b, h, *reversed(rows_shape)),
        (*options, *saved, hidden_grad_TBH, *carry_grad),
    )
    # In two dimensions: with three, XLA transposes both arrays.
    kernel_grad_HG = gated_h_TBH.reshape(-1, h).T @ product_grad_TBG.reshape(-1, 4 * h)
    weights_grad = Weights(
        kernel_grad_HG, rows_grad_NF if has_rows else None, None if gain_G is None else gain_grad_G
    )
    inputs_grad = None if has_rows else rows_grad_NF.reshape(t, b, -1)
    return weights_grad, (dc_BH, dh_BH), inputs_grad


def _pack_gates(kernel_HG: jax.Array) -> jax.Array:
    """Return panels of i and f, and of g and o, for each PANEL / 2 units: 32 columns of H rows."""
    h = len(kernel_HG)
    return kernel_HG.reshape(h, 2, 2, -1, PANEL // 2).transpose(3, 1, 0, 2, 4)


def _pack_units(kernel_HG: jax.Array) -> jax.Array:
    """Return panels of the transposed kernel for each PANEL units: 32 columns of G rows."""
    return kernel_HG.reshape(-1, PANEL, kernel_HG.shape[1]).swapaxes(1, 2)


def _call(
    name: str,
    shapes: tuple[tuple[int, ...], ...],
    sizes: tuple[int, ...],
    given: tuple[jax.Array | None, ...],
    norm_epsilon: float = 0.0,
) -> Sequence[jax.Array]:
    """Call a handler of native.cc; None becomes an array without elements."""
    load()
    dtypes = {0: jnp.int32, 1: jnp.bool_}  # of ids_TB and keep_TB
    arrays = [
        jnp.zeros(0, dtypes.get(i, jnp.float32)) if leaf is None else leaf
        for i, leaf in enumerate(given)
    ]
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    call = jax.ffi.ffi_call(f"charlstm_lstm_{name}", results)
    return call(*arrays, sizes=np.array(sizes), epsilon=np.float32(norm_epsilon))


# --- the choice between native.cc and fused_lstm when a program is compiled ---

LOOPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "forward": (_forward_native, forward_scan),
    "backward": (_backward_native, backward_scan),
}
_loop_p = Primitive("charlstm_loop")
_loop_p.multiple_results = True


def _choose(loop: str, static: tuple[Any, ...], *given: Any) -> Any:
    """Return what both functions of LOOPS return for (*static, *given)."""
    leaves, tree = jax.tree.flatten(given)
    result = jax.eval_shape(partial(LOOPS[loop][1], *static), *given)
    shapes = tuple(leaf.shape for leaf in jax.tree.leaves(result))
    found = _loop_p.bind(*leaves, loop=loop, static=static, tree=tree, shapes=shapes)
    return jax.tree.unflatten(jax.tree.structure(result), found)


_recur = differentiable(
    lambda norm_epsilon, with_residuals, *given: _choose(
        "forward", (norm_epsilon, with_residuals), *given
    ),
    lambda *given: _choose("backward", (), *given),
)


def _run(which: int, *leaves: jax.Array, loop: str, static: Any, tree: Any, shapes: Any) -> Any:
    return jax.tree.leaves(LOOPS[loop][which](*static, *tree.unflatten(leaves)))


def _is_local(context: mlir.LoweringRuleContext) -> bool:
    """Return whether a program runs in this process on one device: decided when it is lowered."""
    module = context.module_context
    num_devices = getattr(module.axis_context, "num_devices", 1)
    return num_devices == 1 and not module.lowering_parameters.for_export


def _lower_on_cpu(context: mlir.LoweringRuleContext, *leaves: Any, **options: Any) -> Any:
    run = partial(_run, 0 if _is_local(context) else 1)
    return mlir.lower_fun(run, multiple_results=True)(context, *leaves, **options)


def _map_loop(leaves: Any, axes: Any, **options: Any) -> Any:
    """Run the loop for one example after another, under jax.vmap."""
    mapped = {
        i: jnp.moveaxis(leaf, axis, 0)
        for i, (leaf, axis) in enumerate(zip(leaves, axes, strict=True))
        if axis is not None
    }

    def run_one(one: dict[int, jax.Array]) -> list[jax.Array]:
        return _loop_p.bind(*(one.get(i, leaf) for i, leaf in enumerate(leaves)), **options)

    found = jax.lax.map(run_one, mapped)
    return found, [0] * len(found)


def _bind(*leaves: Any, **options: Any) -> Any:
    return _loop_p.bind(*leaves, **options)


_loop_p.def_impl(jax.jit(_bind, static_argnames=("loop", "static", "tree", "shapes")))
_loop_p.def_abstract_eval(
    lambda *leaves, shapes, **options: [jax.core.ShapedArray(s, jnp.float32) for s in shapes]
)
mlir.register_lowering(_loop_p, mlir.lower_fun(partial(_run, 1), multiple_results=True))
mlir.register_lowering(_loop_p, _lower_on_cpu, platform="cpu")
batching.primitive_batchers[_loop_p] = _map_loop
