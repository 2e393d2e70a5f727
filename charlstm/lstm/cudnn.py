"""The LSTM of charlstm.lstm.reference by cuDNN, for NVIDIA GPUs."""

from typing import Any

import jax
import jax.numpy as jnp

from charlstm.lstm.reference import GATES, LayerCarry, Params, as_one_hot


def cudnn_lstm(
    params: Params,
    carry: LayerCarry,
    inputs: jax.Array,
    *,
    keep_TB: jax.Array | None = None,
    mask_BH: jax.Array | None = None,
    dtype: Any = jnp.float32,
) -> tuple[LayerCarry, jax.Array]:
    """Run one LSTM layer over time by cuDNN; not yet run on a GPU.

    Arguments, results and reverse-mode gradients are those of flax_lstm; there is no vmap. Tests
    on a CPU cover the packing of the weights and the order of axes only.

    Raises:
      ValueError: without an NVIDIA GPU, for a dtype other than float32, and for keep_TB, mask_BH,
        `scale` and `norm`, which cuDNN does not support.
    """
    from jax.experimental import rnn

    if jnp.dtype(dtype) != jnp.float32:
        raise ValueError(f"dtype={dtype}: cuDNN's LSTM takes float32 only")
    if keep_TB is not None:
        raise ValueError("keep_TB: cuDNN's LSTM cannot reset its carry within a sequence")
    if mask_BH is not None:
        raise ValueError("mask_BH: cuDNN's LSTM cannot mask its hidden state")
    if "scale" in params:
        raise ValueError("scale: cuDNN's LSTM cannot scale its hidden state")
    if "norm" in params:
        raise ValueError("norm: cuDNN's LSTM cannot normalise its recurrent products")
    if jax.default_backend() != "gpu":
        raise ValueError(
            f"cuDNN's LSTM needs an NVIDIA GPU and JAX runs on {jax.default_backend()!r}; "
            "use recurrence='fused'"
        )
    inputs_TBE = as_one_hot(params, inputs, dtype)
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


def pack_cudnn(params: Params) -> jax.Array:
    """Return the parameters in cuDNN's layout: a vector of transposed kernels, then biases.

    cuDNN adds two biases; the first is 0, since Flax's cell has only the second.
    """
    kernels = [params[f"{side}{gate}"]["kernel"].T.ravel() for side in "ih" for gate in GATES]
    biases = [params[f"h{gate}"]["bias"] for gate in GATES]
    return jnp.concatenate([*kernels, *map(jnp.zeros_like, biases), *biases])
