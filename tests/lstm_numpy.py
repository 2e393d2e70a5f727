"""The LSTM in plain NumPy, gate by gate, and its gradient by hand: the oracle of the recurrence."""

import jax
import jax.numpy as jnp
import numpy as np

GATES = "ifgo"
# T, B, E and H all differ, to detect swapped axes. With fewer than 4 x 16 sums some rows have a
# mean square near 0, and dividing by it magnifies the rounding of float32.
T, B, E, H = 8, 3, 5, 16
# Optional parameters of a layer beside those of the Flax cell.
ALL_PARTS = ("scale", "norm")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(params, carry, inputs_TBE, mask_BH=1.0):
    """Return the last carry (c_BH, h_BH) and hidden_TBH, on the parameter tree of Flax's cell.

    The gates read mask_BH * h, with the kernel `scale` (1 + x scale) * mask_BH * h. With `norm` the
    recurrent products are divided by their root mean square over all gates and multiplied by the
    gain.
    """
    steps = _steps(params, carry, inputs_TBE, mask_BH)
    hidden_TBH = np.stack([step["h"] for step in steps])
    return (steps[-1]["c"], steps[-1]["h"]), hidden_TBH


def _steps(params, carry, inputs_TBE, mask_BH):
    c_BH, h_BH = carry
    steps = []
    for x_BE in inputs_TBE:
        scale_BH = 1 + x_BE @ params["scale"]["kernel"] if "scale" in params else 1.0
        gated_h_BH = scale_BH * mask_BH * h_BH
        step = {
            "x": x_BE,
            "h_before": h_BH,
            "c_before": c_BH,
            "scale": scale_BH,
            "gated_h": gated_h_BH,
        }
        product_BG = np.hstack([gated_h_BH @ params["h" + gate]["kernel"] for gate in GATES])
        if "norm" in params:
            step["root"] = 1 / np.sqrt((product_BG**2).mean(axis=1, keepdims=True) + 0.1)
            step["normed"] = product_BG * step["root"]
            product_BG = step["normed"] * params["norm"]["gain"]
        for gate, product_BH in zip(GATES, np.split(product_BG, 4, axis=1), strict=True):
            sum_BH = x_BE @ params["i" + gate]["kernel"] + product_BH + params["h" + gate]["bias"]
            step[gate] = np.tanh(sum_BH) if gate == "g" else sigmoid(sum_BH)
        step["c"] = c_BH = step["f"] * c_BH + step["i"] * step["g"]
        step["h"] = h_BH = step["o"] * np.tanh(c_BH)
        steps.append(step)
    return steps


def lstm_gradient(params, carry, inputs_TBE, carry_grad, hidden_grad_TBH, mask_BH=1.0):
    """Return the gradients by (params, carry, inputs_TBE), by back-propagation through time.

    `carry_grad` and `hidden_grad_TBH` are the gradients of a loss by the results of lstm.
    """
    params_grad = {name: {k: np.zeros_like(v) for k, v in p.items()} for name, p in params.items()}
    inputs_grad_TBE = np.zeros_like(inputs_TBE)
    dc_BH, dh_BH = carry_grad
    steps = _steps(params, carry, inputs_TBE, mask_BH)
    for time in reversed(range(len(steps))):
        step = steps[time]
        i_BH, f_BH, g_BH, o_BH = (step[gate] for gate in GATES)
        dh_BH = dh_BH + hidden_grad_TBH[time]
        dc_BH = dc_BH + dh_BH * o_BH * (1 - np.tanh(step["c"]) ** 2)
        sum_grads = {
            "i": dc_BH * g_BH * i_BH * (1 - i_BH),
            "f": dc_BH * step["c_before"] * f_BH * (1 - f_BH),
            "g": dc_BH * i_BH * (1 - g_BH**2),
            "o": dh_BH * np.tanh(step["c"]) * o_BH * (1 - o_BH),
        }
        dc_BH, dh_BH = dc_BH * f_BH, np.zeros_like(dh_BH)
        for gate, ds_BH in sum_grads.items():
            params_grad["i" + gate]["kernel"] += step["x"].T @ ds_BH
            params_grad["h" + gate]["bias"] += ds_BH.sum(axis=0)
            inputs_grad_TBE[time] += ds_BH @ params["i" + gate]["kernel"].T
        product_grad_BG = np.hstack([*sum_grads.values()])
        if "norm" in params:
            params_grad["norm"]["gain"] += (product_grad_BG * step["normed"]).sum(axis=0)
            product_grad_BG = product_grad_BG * params["norm"]["gain"]
            # The Jacobian of p / rms(p), row by row.
            for row, (normed_G, root) in enumerate(zip(step["normed"], step["root"], strict=True)):
                size = len(normed_G)
                jacobian_GG = root * (np.eye(size) - np.outer(normed_G, normed_G) / size)
                product_grad_BG[row] = jacobian_GG @ product_grad_BG[row]
        for gate, dp_BH in zip(GATES, np.split(product_grad_BG, 4, axis=1), strict=True):
            params_grad["h" + gate]["kernel"] += step["gated_h"].T @ dp_BH
            dh_BH += dp_BH @ params["h" + gate]["kernel"].T
        dh_BH = dh_BH * mask_BH
        if "scale" in params:
            scale_grad_BH = dh_BH * step["h_before"]
            params_grad["scale"]["kernel"] += step["x"].T @ scale_grad_BH
            inputs_grad_TBE[time] += scale_grad_BH @ params["scale"]["kernel"].T
        dh_BH = dh_BH * step["scale"]
    return params_grad, (dc_BH, dh_BH), inputs_grad_TBE


def draw_params(rng, input_size, hidden_size, parts=ALL_PARTS):
    params = {}
    for gate in GATES:
        # The sizes of a trained model: gates between 0 and 1.
        into = rng.normal(size=(input_size, hidden_size)) / np.sqrt(input_size)
        back = rng.normal(size=(hidden_size, hidden_size)) / np.sqrt(hidden_size)
        params["i" + gate] = {"kernel": into}
        params["h" + gate] = {"kernel": back, "bias": rng.normal(size=hidden_size)}
    if "scale" in parts:
        kernel = rng.normal(size=(input_size, hidden_size)) / np.sqrt(input_size)
        params["scale"] = {"kernel": kernel}
    if "norm" in parts:
        params["norm"] = {"gain": rng.normal(size=4 * hidden_size)}
    return params


def draw_case(seed, t=T, b=B, e=E, h=H, parts=ALL_PARTS):
    """Return (params, carry, inputs_TBE), and gradients for the carry and the hidden states."""
    rng = np.random.default_rng(seed)
    carry = rng.normal(size=(b, h)), rng.normal(size=(b, h))
    arguments = draw_params(rng, e, h, parts), carry, rng.normal(size=(t, b, e))
    carry_grad = rng.normal(size=(b, h)), rng.normal(size=(b, h))
    return arguments, (carry_grad, rng.normal(size=(t, b, h)))


def draw_ids(seed, t=T, b=B, e=E):
    return np.random.default_rng(seed).integers(e, size=(t, b), dtype=np.int32)


def singles(tree):
    """Return a tree with all its floats in single precision."""
    return jax.tree.map(lambda leaf: leaf if leaf.dtype == np.int32 else jnp.float32(leaf), tree)
