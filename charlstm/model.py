"""The language model: logits of the next character from the characters so far."""

from __future__ import annotations  # help() then shows names such as TrainStep

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from charlstm.checks import as_float32, check_choice, check_count, check_ids, check_rate
from charlstm.data.vocab import END, Vocab
from charlstm.lstm import native_library
from charlstm.lstm.cudnn import cudnn_lstm
from charlstm.lstm.fused import fused_lstm
from charlstm.lstm.native import native_lstm
from charlstm.lstm.reference import (
    NORM_EPSILON,
    LayerCarry,
    LayerStates,
    expand_rank,
    flax_lstm,
    init_lstm,
    trace_lstm,
)

Carry = tuple[LayerCarry, ...]
RECURRENCES: dict[str, Callable[..., tuple[LayerCarry, jax.Array]]] = {
    "fused": fused_lstm,
    "native": native_lstm,
    "flax": flax_lstm,
    "cudnn": cudnn_lstm,
}
STATES = "intermediates"  # the collection of Flax that hidden_states asks for
INPUTS = ("one_hot", "embed", "scaled")
DTYPES = ("float32", "bfloat16")


class CharLSTM(nn.Module):
    """A character-level language model: an input layer, N LSTM layers and a dense layer.

    Attributes:
      vocab_size: V.
      hidden_size: H, the number of units of each layer.
      num_layers: N.
      dropout_rate: dropout of each layer's output.
      variational_dropout: use one dropout mask for all time steps of a call (Gal and Ghahramani
        2016, arXiv 1512.05287) in place of a new mask per time step.
      recurrent_dropout: dropout rate of the hidden state that each layer's gates read, with one
        mask per row and call (hidden_mask).
      multiplicative: scale the hidden state that the gates read by a function of the layer's
        input, as in charlstm.lstm.reference.
      recurrent_rms_norm: divide the recurrent product of the gates by its root mean square.
      norm_epsilon: added to the mean square by `recurrent_rms_norm`.
      input: 'one_hot', 'embed' (a learnt vector), or 'scaled' (the id divided by V).
      embed_size: E, used with input='embed'.
      tie_embeddings: compute the logits from a dense layer of size E and the transposed embedding
        table, plus a bias (Press and Wolf 2017, arXiv 1608.05859); needs input='embed'.
      end_id: id of the character that ends a document and resets the carry; None without documents.
      recurrence: 'fused' (fast; gradients of any order, no forward mode), 'native' (C++ on a CPU:
        faster, first derivatives), 'flax' (the scanned Flax cell: slower, all derivatives) or
        'cudnn' (NVIDIA GPUs only, not yet run on one).
      dtype: 'float32' or 'bfloat16', the type of computations; parameters, carry and logits are
        float32.
      num_shards: number of devices that share the rows of a batch; makes 'fused' fast there.

    Raises:
      ValueError: if a field has an invalid value.
    """

    vocab_size: int
    hidden_size: int = 256
    num_layers: int = 1
    dropout_rate: float = 0.0
    variational_dropout: bool = False
    recurrent_dropout: float = 0.0
    multiplicative: bool = False
    recurrent_rms_norm: bool = False
    norm_epsilon: float = NORM_EPSILON
    input: str = "one_hot"
    embed_size: int = 64
    tie_embeddings: bool = False
    end_id: int | None = None
    recurrence: str = "fused"
    dtype: str = "float32"
    num_shards: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab_size", "hidden_size", "num_layers", "embed_size", "num_shards"):
            check_count(name, getattr(self, name))
        for name in ("dropout_rate", "recurrent_dropout"):
            check_rate(name, getattr(self, name))
        check_choice("input", self.input, INPUTS)
        check_choice("recurrence", self.recurrence, RECURRENCES)
        check_choice("dtype", getattr(self.dtype, "__name__", str(self.dtype)), DTYPES)
        if not 0 < as_float32(self.norm_epsilon) < math.inf:
            raise ValueError(
                f"norm_epsilon={self.norm_epsilon!r}: must be above 0 and finite in float32"
            )
        if self.tie_embeddings and self.input != "embed":
            raise ValueError(f"tie_embeddings=True: needs input='embed', not {self.input!r}")
        if self.end_id is not None:
            check_count("end_id", self.end_id, least=0)
            if self.end_id >= self.vocab_size:
                raise ValueError(f"end_id={self.end_id}: must be less than V={self.vocab_size}")

    @nn.compact
    def __call__(
        self, ids_BT: jax.Array, carry: Carry, *, train: bool = False
    ) -> tuple[jax.Array, Carry]:
        """Return logits_BTV of the next characters and the carry after the last one.

        Args:
          ids_BT: integers from 0 to V - 1.
          carry: (c_BH, h_BH) for every layer, for example zero_carry.
          train: apply dropout, with the random key named 'dropout'.

        Raises:
          ValueError: if the carry has other shapes, or an id is outside 0 to V - 1. The values of
            traced arrays are unknown; there, an invalid id makes its row NaN up to the end of its
            document.
        """
        recur = RECURRENCES[self.recurrence]
        if self.recurrence != "cudnn":
            recur = partial(recur, norm_epsilon=self.norm_epsilon)
        if self.recurrence in ("fused", "native"):
            recur = partial(recur, num_shards=self.num_shards)
        check_ids("ids_BT", ids_BT, self.vocab_size)
        ids_BT = jnp.asarray(ids_BT)
        check_carry(carry, ids_BT.shape[0], self.hidden_size, self.num_layers)
        carry = poison_rows(carry, ids_BT, self.vocab_size)
        layer, embed = self._embed_inputs(ids_BT.T)
        keep_TB = None if self.end_id is None else ids_BT.T != self.end_id
        input_size = self.vocab_size if self.input == "one_hot" else layer.shape[-1]
        shared = (0,) if self.variational_dropout else ()
        new_carry = []
        for index, layer_carry in enumerate(carry):
            parts = self.multiplicative, self.recurrent_rms_norm
            params = self.param(f"lstm_{index}", init_lstm, input_size, self.hidden_size, *parts)
            mask_BH = None
            if train and self.recurrent_dropout:
                rng = self.make_rng("dropout")
                mask_BH = hidden_mask(rng, self.recurrent_dropout, layer_carry[1].shape)
            options: dict[str, Any] = {"keep_TB": keep_TB, "dtype": self.dtype}
            if self.is_mutable_collection(STATES):
                options["norm_epsilon"] = self.norm_epsilon
                layer_carry, states = trace_lstm(params, layer_carry, layer, **options)
                self.sow(STATES, f"layer_{index}", states)
                layer_TBE = states.h_BTH.swapaxes(0, 1)
            else:
                options["mask_BH"] = mask_BH
                layer_carry, layer_TBE = recur(params, layer_carry, layer, **options)
            layer = nn.Dropout(self.dropout_rate, broadcast_dims=shared)(
                layer_TBE, deterministic=not train
            )
            new_carry.append(layer_carry)
            input_size = self.hidden_size
        return self._logits(layer, embed).swapaxes(0, 1), tuple(new_carry)

    def _embed_inputs(self, ids_TB: jax.Array) -> tuple[jax.Array, nn.Embed | None]:
        if self.input == "one_hot":
            return ids_TB, None  # the recurrences take ids in place of one-hot vectors
        if self.input == "embed":
            # Rounded after the lookup, whose gradient is then summed in float32.
            embed = nn.Embed(self.vocab_size, self.embed_size, name="embed")
            return embed(ids_TB).astype(self.dtype), embed
        ids_TB = ids_TB.astype(jnp.float32)
        return (ids_TB / self.vocab_size).astype(self.dtype)[..., None], None

    def _logits(self, layer_TBH: jax.Array, embed: nn.Embed | None) -> jax.Array:
        is_tied = embed is not None and self.tie_embeddings
        dense = nn.Dense(
            self.embed_size if is_tied else self.vocab_size,
            kernel_init=nn.initializers.glorot_uniform(),
            dtype=self.dtype,
            dot_general=float32_product,
            name="dense",
        )
        if embed is None or not is_tied:
            return dense(layer_TBH)
        bias_V = self.param("bias", nn.initializers.zeros_init(), (self.vocab_size,))
        table_VE = embed.embedding.astype(self.dtype)
        logits_TBV = jnp.dot(dense(layer_TBH).astype(self.dtype), table_VE.T).astype(jnp.float32)
        return logits_TBV + expand_rank(bias_V, logits_TBV)


def float32_product(*args: Any, **kwargs: Any) -> jax.Array:
    """Return jax.lax.dot_general of the arguments, converted to float32.

    A bias that is added to it has its gradient summed in float32.
    """
    return jax.lax.dot_general(*args, **kwargs).astype(jnp.float32)


def hidden_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Return a dropout mask_BH: 0 with probability `rate`, otherwise 1 / (1 - `rate`).

    It is for all time steps of a call (Gal and Ghahramani 2016, arXiv 1512.05287).
    """
    is_kept_BH = jax.random.bernoulli(key, jnp.float32(1 - rate), shape)
    return is_kept_BH.astype(jnp.float32) / (1 - rate)


def model_from_config(config: ConfigDict, vocab: Vocab) -> CharLSTM:
    """Return the model that `config.model` describes, for the characters of `vocab`.

    With recurrence='auto' it has the fastest for one device: 'native', which has first derivatives
    only, if it can run here, otherwise 'fused'.
    """
    config = with_recurrence(config)
    has_documents = config.data.document_separator and END in vocab.characters
    end_id = vocab.characters.index(END) if has_documents else None
    return CharLSTM(vocab_size=len(vocab), end_id=end_id, **config.model.to_dict())


def model_of_run(config: ConfigDict, vocab: Vocab) -> CharLSTM:
    """Return the model that `config.model` describes, with a recurrence that can run here.

    'fused', which computes the same, stands in for 'cudnn', and for 'native' without a compiler.
    """
    model = model_from_config(config, vocab)
    needs_compiler = model.recurrence == "native"
    if model.recurrence == "cudnn" or (needs_compiler and not native_library.is_available()):
        return model.clone(recurrence="fused")
    return model


def with_recurrence(config: ConfigDict, num_devices: int = 1) -> ConfigDict:
    """Return a copy of `config` with 'native' or 'fused' in place of model.recurrence='auto'."""
    config = ConfigDict(config.to_dict())  # mutable, unlike a FrozenConfigDict
    if config.model.recurrence == "auto":
        config.model.recurrence = native_library.choose(config.model.dtype, num_devices)
    return config


def predict(
    model: CharLSTM,
    params: Any,
    ids_BT: jax.Array,
    carry: Carry,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, Carry]:
    """Return logits_BTV and the new carry; apply dropout if there is a `dropout_key`."""
    if dropout_key is None:
        return model.apply({"params": params}, ids_BT, carry)  # type: ignore[return-value]
    rngs = {"dropout": dropout_key}
    return model.apply({"params": params}, ids_BT, carry, train=True, rngs=rngs)  # type: ignore[return-value]


def hidden_states(
    model: CharLSTM, params: Any, ids_BT: jax.Array, carry: Carry
) -> tuple[LayerStates, ...]:
    """Return LayerStates for each layer: its states and gates at each character.

    They are the states of `predict` without dropout, up to rounding, for any `recurrence`.

    Raises:
      ValueError: as CharLSTM does.
    """
    _, collections = model.apply({"params": params}, ids_BT, carry, mutable=STATES)
    return tuple(collections[STATES][f"layer_{index}"][0] for index in range(model.num_layers))


def zero_carry(model: CharLSTM, batch_size: int) -> Carry:
    """Return (c_BH, h_BH) of zeros for each layer of `model`, for B sequences."""
    return _zeros(batch_size, model.hidden_size, model.num_layers)


# Compiled, since eager jnp.zeros transfers a Python number, which jax.transfer_guard forbids.
@partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(batch_size: int, hidden_size: int, num_layers: int) -> Carry:
    def zeros() -> jax.Array:
        return jnp.zeros((batch_size, hidden_size), jnp.float32)

    return tuple((zeros(), zeros()) for _ in range(num_layers))


def check_carry(carry: Any, batch_size: int, hidden_size: int, num_layers: int) -> None:
    """Raise ValueError if `carry` has other shapes; Flax's cells accept them silently."""
    wanted = (((batch_size, hidden_size),) * 2,) * num_layers
    found = jax.tree.map(jnp.shape, carry)
    if found != wanted:
        raise ValueError(
            f"carry: has the shapes {found}; {batch_size} rows of ids and {num_layers} layers of "
            f"{hidden_size} units need {wanted}"
        )


def poison_rows(carry: Carry, ids_BT: jax.Array, vocab_size: int) -> Carry:
    """Set h of the first layer to NaN in the rows that have an id outside 0 to V - 1."""
    # Indexing with such an id silently reads another row.
    is_valid_B = jnp.all((ids_BT >= 0) & (ids_BT < vocab_size), axis=1)
    (c_BH, h_BH), *others = carry
    return ((c_BH, jnp.where(is_valid_B[:, None], h_BH, jnp.nan)), *others)
