"""Plain LSTMs with random weights, for tests of the exchange with other libraries."""

from functools import partial

import jax
import numpy as np
from etils import epath
from helpers import small_config

from charlstm.exchange.folder import Trained
from charlstm.exchange.weights import shapes_of
from charlstm.model import model_from_config, predict, zero_carry
from charlstm.training.setup import prepare


def plain_trained(book_path, workdir, **changes):
    """Return a plain LSTM with random weights, large enough that each of them matters."""
    settings = {"model.multiplicative": False, "model.recurrent_rms_norm": False}
    settings |= {"model.recurrence": "fused", "model.hidden_size": 6}
    run = prepare(small_config(book_path, **settings | changes), epath.Path(workdir)).run
    model = model_from_config(run.config, run.vocab)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape) / 2), shapes_of(model))
    return Trained(run, model, params, {})


def logits_of(model, params, ids_BT):
    """Return logits_BTV from a zero carry."""
    carry = zero_carry(model, len(ids_BT))
    return np.asarray(jax.jit(partial(predict, model))(params, np.int32(ids_BT), carry)[0])
