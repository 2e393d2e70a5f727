"""Exchange plain LSTMs with torch: a state_dict of nn.LSTM and nn.Linear in safetensors.

torch has two biases per gate, which it adds, and the transposes of the kernels here. Neither
function needs torch.
"""

import re
from collections.abc import Mapping

import numpy as np
from etils import epath
from safetensors.numpy import save

from charlstm.errors import UserError
from charlstm.exchange.folder import Trained, describe, write_folder
from charlstm.exchange.plain import PlainLayer, PlainLSTM, to_plain
from charlstm.exchange.safetensors import WEIGHTS

_FIRST = "weight_ih_l0"  # the end of a name that every nn.LSTM has
_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

_FILES = "- `model.safetensors`: the weights as a `state_dict` of torch, in float32."
_LOADING = '''
With torch and safetensors:

```python
import json

import torch
from safetensors.torch import load_file
from torch import nn


class CharLSTM(nn.Module):
    def __init__(self):
        super().__init__()
{embed}        self.lstm = nn.LSTM({input_size}, {hidden_size}, {num_layers}, batch_first=True)
        self.dense = nn.Linear({hidden_size}, {vocab_size})

    def forward(self, ids_BT, carry=None):
        """Return logits_BTV of the next characters, and the carry (h, c)."""
        hidden_BTH, carry = self.lstm({inputs}, carry)
        return self.dense(hidden_BTH), carry


model = CharLSTM()
model.load_state_dict(load_file("OUT/model.safetensors"))
with open("OUT/vocab.json", encoding="utf-8") as file:
    characters = json.load(file)
```

charlstm reads this folder in place of a run folder, also after `model.safetensors` was replaced by
`save_file(model.state_dict(), "OUT/model.safetensors")` of a model that was trained on. A model
of other characters needs a folder with its own `model.safetensors` and `vocab.json`.
'''


def export(trained: Trained, out: epath.Path) -> None:
    """Write `trained` to the folder `out`.

    Raises:
      UserError: if the model is not a plain LSTM, or if `out` cannot be written.
    """
    plain = to_plain(trained.run, trained.params)
    input_size, vocab_size = plain.layers[0].input_kernel_EG.shape[0], len(plain.bias_V)
    is_embedded = plain.embedding_VE is not None
    loading = _LOADING.format(
        embed=f"        self.embed = nn.Embedding({vocab_size}, {input_size})\n"
        if is_embedded
        else "",
        inputs="self.embed(ids_BT)"
        if is_embedded
        else f"nn.functional.one_hot(ids_BT, {vocab_size}).float()",
        input_size=input_size,
        hidden_size=plain.kernel_HV.shape[0],
        num_layers=len(plain.layers),
        vocab_size=vocab_size,
    )
    weights = {WEIGHTS: save(to_state_dict(plain))}
    write_folder(describe(trained, out, _FILES, loading), weights, out)


def to_state_dict(plain: PlainLSTM) -> dict[str, np.ndarray]:
    """Return the state_dict of a module with `embed` (unless one-hot), `lstm` and `dense`."""
    tensors = {"dense.weight": plain.kernel_HV.T, "dense.bias": plain.bias_V}
    if plain.embedding_VE is not None:
        tensors["embed.weight"] = plain.embedding_VE
    for index, layer in enumerate(plain.layers):
        tensors[f"lstm.weight_ih_l{index}"] = layer.input_kernel_EG.T
        tensors[f"lstm.weight_hh_l{index}"] = layer.recurrent_kernel_HG.T
        tensors[f"lstm.bias_ih_l{index}"] = layer.bias_G
        tensors[f"lstm.bias_hh_l{index}"] = np.zeros_like(layer.bias_G)
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def is_state_dict(tensors: Mapping[str, np.ndarray]) -> bool:
    """Return whether `tensors` are those of a module with an nn.LSTM."""
    return any(name.endswith(_FIRST) for name in tensors)


def from_state_dict(path: epath.Path, tensors: Mapping[str, np.ndarray]) -> PlainLSTM:
    """Return the weights from a state_dict; its modules may have any names.

    Args:
      path: the file, for messages.
      tensors: those of one nn.LSTM, one nn.Linear, and at most one nn.Embedding.

    Raises:
      UserError: if there are others, or if one is missing.
    """
    prefixes = [name.removesuffix(_FIRST) for name in tensors if name.endswith(_FIRST)]
    if len(prefixes) != 1:
        raise _refused(path, f"it has {len(prefixes)} modules nn.LSTM")
    rest, layers = dict(tensors), list[PlainLayer]()
    while f"{prefixes[0]}weight_ih_l{len(layers)}" in rest:
        names = [f"{prefixes[0]}{name}_l{len(layers)}" for name in _NAMES]
        if missing := [name for name in names if name not in rest]:
            raise _refused(path, f"{missing[0]} is missing")
        layers.append(_to_layer(path, names, *map(rest.pop, names)))
    biases = [name for name in rest if name.endswith(".bias") or name == "bias"]
    if len(biases) != 1:
        raise _refused(path, f"it has {len(biases)} further biases in place of one nn.Linear's")
    kernel_name = re.sub("bias$", "weight", biases[0])
    bias_V, kernel_VH = rest.pop(biases[0]), rest.pop(kernel_name, np.zeros(0))
    embeddings = list(rest.values())
    if len(embeddings) > 1 or any(array.ndim != 2 for array in (kernel_VH, *embeddings)):
        raise _refused(path, f"it has other tensors: {', '.join(sorted(rest)[:3]) or kernel_name}")
    embedding_VE = embeddings[0] if embeddings else None
    return PlainLSTM(embedding_VE, tuple(layers), kernel_VH.T, bias_V)


def _to_layer(path: epath.Path, names: list[str], *arrays: np.ndarray) -> PlainLayer:
    kernel_GE, recurrent_kernel_GH, input_bias_G, bias_G = arrays
    for name, array, ndim in zip(names, arrays, (2, 2, 1, 1), strict=True):
        if array.ndim != ndim:
            raise _refused(path, f"{name} has {array.ndim} axes")
    if input_bias_G.shape != bias_G.shape:
        raise _refused(path, f"{names[2]} and {names[3]} have other shapes")
    return PlainLayer(kernel_GE.T, recurrent_kernel_GH.T, input_bias_G + bias_G)


def _refused(path: epath.Path, reason: str) -> UserError:
    return UserError(
        f"{path}: not a state_dict of one nn.LSTM (one direction, no projection), one nn.Linear "
        f"and at most one nn.Embedding, all with biases: {reason}; export such a model"
    )
