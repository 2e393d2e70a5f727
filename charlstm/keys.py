"""Random keys of a run: one for each purpose, derived from the key of the run.

    stream    key                 purpose                             derived further by
    params    fold_in(key, 0)     initial parameters                  lstm.reference.init_lstm
    dropout   fold_in(key, 1)     dropout masks (TrainState.key)      fold_in(., step)
    sample    fold_in(key, 2)     characters of samples               fold_in(., character), and
                                                                      fold_in(., row) of that

The key of a run is jax.random.key(config.seed). Samples during training fold in the step first.
The order of the data needs no key: data.batches derives it with NumPy from the integer seed and the
epoch or step, so batches can be read without JAX.
"""

import jax

STREAMS = ("params", "dropout", "sample")


def derive_key(key: jax.Array, stream: str) -> jax.Array:
    """Return the key of one stream: 'params', 'dropout' or 'sample'.

    Raises:
      ValueError: for another stream.
    """
    if stream not in STREAMS:
        raise ValueError(f"stream={stream!r}: must be one of {', '.join(STREAMS)}")
    # Compiled, because jax.transfer_guard forbids passing a Python number.
    return jax.jit(jax.random.fold_in, static_argnums=1)(key, STREAMS.index(stream))
