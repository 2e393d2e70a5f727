"""The LSTM over time: a pure function of parameters, carry and inputs.

The parameters are a dict with exactly the tree of Flax's LSTM cells: kernels `ii if ig io` from
the input, kernels and biases `hi hf hg ho` from the hidden state, for the input gate, the forget
gate, the candidate and the output gate.

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
    shape_G = (input_size, 4 * hidden_size)
    input_kernel_EG = nn.initializers.glorot_uniform()(input_key, shape_G)
    recurrent_kernel_HG = nn.initializers.orthogonal()(
        recurrent_key, (hidden_size, 4 * hidden_size)
    )
    params: Params = {}
    for gate, kernel_EH, kernel_HH in zip(
        GATES,
        jnp.split(input_kernel_EG, 4, axis=1),
        jnp.split(recurrent_kernel_HG, 4, axis=1),
        strict=True,
    ):
        params[f"i{gate}"] = {"kernel": kernel_EH}
        bias_H = jnp.full(hidden_size, 1.0 if gate == "f" else 0.0)
        params[f"h{gate}"] = {"kernel": kernel_HH, "bias": bias_H}
    return params


def lstm(
    params: Params,
    carry: LayerCarry,
    inputs_TBE: jax.Array,
    *,
    cell: str = "OptimizedLSTMCell",
    dtype: Any = jnp.float32,
) -> tuple[LayerCarry, jax.Array]:
    """Run one LSTM layer over time by scanning the Flax cell.

    Args:
      params: the parameters of a Flax LSTM cell with H hidden units.
      carry: (c_BH, h_BH), float32.
      inputs_TBE: the input of every time step.
      cell: a name in CELLS.
      dtype: the type to compute the gates in.

    Returns:
      The carry after the last time step, and hidden_TBH, the output of every time step.
    """
    hidden_size = carry[0].shape[-1]
    flax_cell = CELLS[cell](features=hidden_size, dtype=dtype)

    def step(carry: LayerCarry, inputs_BE: jax.Array) -> tuple[LayerCarry, jax.Array]:
        (c_BH, h_BH), _ = flax_cell.apply({"params": params}, carry, inputs_BE)
        # Rounding the cell state at every step would lose what it has to remember.
        return (c_BH.astype(jnp.float32), h_BH.astype(jnp.float32)), h_BH

    return jax.lax.scan(step, carry, inputs_TBE)
