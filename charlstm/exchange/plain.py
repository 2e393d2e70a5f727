"""The weights of a plain LSTM, which other libraries can express.

A plain LSTM has any inputs, layers of the equations of charlstm.lstm.reference without `scale` and
`norm`, and a dense layer. The gates stand side by side in the order i, f, g, o, which is that of
Keras (i, f, c, o) and of torch.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from charlstm.data.vocab import END
from charlstm.errors import UserError
from charlstm.lstm.reference import GATES
from charlstm.runs.folder import Run


class PlainLayer(NamedTuple):
    """One LSTM layer."""

    input_kernel_EG: np.ndarray
    recurrent_kernel_HG: np.ndarray
    bias_G: np.ndarray


class PlainLSTM(NamedTuple):
    """The weights of a plain LSTM language model."""

    embedding_VE: np.ndarray | None  # None: one-hot inputs
    layers: tuple[PlainLayer, ...]
    kernel_HV: np.ndarray  # of the dense layer
    bias_V: np.ndarray


def check_plain(run: Run) -> None:
    """Raise UserError, naming the setting, if the model of `run` is not a plain LSTM."""
    model, has_documents = run.config.model, run.config.data.document_separator
    refused = {
        f"model.multiplicative={model.multiplicative}": model.multiplicative,
        f"model.recurrent_rms_norm={model.recurrent_rms_norm}": model.recurrent_rms_norm,
        f"model.tie_embeddings={model.tie_embeddings}": model.tie_embeddings,
        f"data.document_separator={has_documents!r}": has_documents and END in run.vocab,
    }
    if settings := [f"config.{setting}" for setting, is_on in refused.items() if is_on]:
        raise UserError(
            f"{run.workdir}: not a plain LSTM, because of {', '.join(settings)}; train one "
            "without, or use --format=safetensors"
        )


def to_plain(run: Run, params: Any) -> PlainLSTM:
    """Return the weights of a run.

    Raises:
      UserError: if its model is not a plain LSTM.
    """
    check_plain(run)
    params = jax.device_get(params)
    layers = (params[f"lstm_{index}"] for index in range(run.config.model.num_layers))
    dense = params["dense"]
    return PlainLSTM(
        embedding_of(params, run.config.model.input, len(run.vocab)),
        tuple(map(to_layer, layers)),
        dense["kernel"],
        dense["bias"],
    )


def embedding_of(params: Any, kind: str, vocab_size: int) -> np.ndarray | None:
    """Return embedding_VE of a model with `model.input` = `kind`, or None for one-hot inputs.

    Scaled inputs are a table of one column.
    """
    if kind == "scaled":
        return (np.arange(vocab_size, dtype=np.float32) / np.float32(vocab_size))[:, None]
    return params["embed"]["embedding"] if kind == "embed" else None


def from_plain(plain: PlainLSTM) -> tuple[dict[str, Any], Any]:
    """Return settings of config.model, and the parameters as NumPy arrays, with no check."""
    lstm = {f"lstm_{index}": _from_layer(layer) for index, layer in enumerate(plain.layers)}
    params: dict[str, Any] = lstm | {"dense": {"kernel": plain.kernel_HV, "bias": plain.bias_V}}
    settings = {
        "hidden_size": plain.layers[0].recurrent_kernel_HG.shape[0],
        "num_layers": len(plain.layers),
        "multiplicative": False,
        "recurrent_rms_norm": False,
        "tie_embeddings": False,
        "input": "one_hot",
    }
    if plain.embedding_VE is not None:
        params["embed"] = {"embedding": plain.embedding_VE}
        settings |= {"input": "embed", "embed_size": plain.embedding_VE.shape[1]}
    return settings, params


def to_layer(params: Any) -> PlainLayer:
    """Return the weights of a layer, without `scale` and `norm`."""
    kernels = {
        side: np.concatenate([params[f"{side}{gate}"]["kernel"] for gate in GATES], axis=1)
        for side in "ih"
    }
    bias_G = np.concatenate([params[f"h{gate}"]["bias"] for gate in GATES])
    return PlainLayer(kernels["i"], kernels["h"], bias_G)


def _from_layer(layer: PlainLayer) -> dict[str, Any]:
    params: dict[str, Any] = {}
    blocks = (np.array_split(array, len(GATES), axis=-1) for array in layer)
    for gate, kernel_EH, kernel_HH, bias_H in zip(GATES, *blocks, strict=True):
        params[f"i{gate}"] = {"kernel": kernel_EH}
        params[f"h{gate}"] = {"kernel": kernel_HH, "bias": bias_H}
    return params
