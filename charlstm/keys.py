"""The random streams of a run: one key for each purpose, derived from the run's key once.

    stream    key                 what it draws                       derived further by
    params    fold_in(key, 0)     the initial parameters              lstm.reference.init_lstm
    dropout   fold_in(key, 1)     the dropout masks (TrainState.key)  fold_in(., step)
    sample    fold_in(key, 2)     the characters of samples           fold_in(., character), and
                                                                      fold_in(., row) of that

In a run `key` is jax.random.key(config.seed), and samples that are written during training fold in
the step first. The order of the data needs no key: data.batches draws it with NumPy from the
integer seed and the epoch or step, so that a batch can be read without JAX.
"""

import jax

STREAMS = ("params", "dropout", "sample")


def derive_key(key: jax.Array, stream: str) -> jax.Array:
    """Return the key of one stream of random numbers: 'params', 'dropout' or 'sample'.

    Raises:
      ValueError: for another stream.
    """
    if stream not in STREAMS:
        raise ValueError(f"stream={stream!r}: must be one of {', '.join(STREAMS)}")
    # Compiled, since jax.transfer_guard forbids to pass a number on.
    return jax.jit(jax.random.fold_in, static_argnums=1)(key, STREAMS.index(stream))
