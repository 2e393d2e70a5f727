"""Export a model as an ONNX graph; every model can be expressed.

The graph maps ids_BT and a carry, c_NBH and h_NBH of the N layers, to logits_BTV and the new carry.
A plain LSTM becomes ONNX's operator LSTM, whose gates stand in the order i, o, f, c (= g). Other
layers become a Scan over time of the equations in charlstm.lstm.reference.
"""

from copy import copy
from itertools import count
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from charlstm.exchange.folder import Trained, describe, write_folder
from charlstm.exchange.plain import embedding_of, to_layer
from charlstm.lstm.reference import GATES
from charlstm.model import CharLSTM
from charlstm.system.extras import import_extra

WEIGHTS = "model.onnx"
# Read by onnxruntime from 1.14 on, of February 2023.
_OPSET, _IR_VERSION = 18, 8

_FILES = """
- `model.onnx`: the model, in float32. Its metadata has the content of `config.json` and
  `vocab.json` under these names.
"""
_LOADING = '''
With onnxruntime and NumPy, without charlstm:

```python
import json

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("OUT/model.onnx")
characters = json.loads(session.get_modelmeta().custom_metadata_map["vocab.json"])
with open("OUT/prompts.json", encoding="utf-8") as file:
    prompts = json.load(file) or characters


def read(text, carry):
    """Return logits_BTV of the next characters, and the carry after the text."""
    ids_BT = np.array([[characters.index(char) for char in text]])
    logits_BTV, *carry = session.run(None, {{"ids": ids_BT, "c": carry[0], "h": carry[1]}})
    return logits_BTV, carry


rng = np.random.default_rng(0)
text, carry = prompts[0], np.zeros((2, {num_layers}, 1, {hidden_size}), np.float32)
logits_BTV, carry = read(text, carry)
for _ in range(200):
    scaled_V = logits_BTV[0, -1] / 0.8  # the temperature
    weights_V = np.exp(scaled_V - scaled_V.max())
    text += characters[rng.choice(len(characters), p=weights_V / weights_V.sum())]
    logits_BTV, carry = read(text[-1], carry)
print(text)
```

| input or output | type | shape |
|---|---|---|
| `ids` | int64, 0 to {last_id} | [B, T] |
| `c`, `h` and `new_c`, `new_h` | float32 | [{num_layers}, B, {hidden_size}] |
| `logits` | float32 | [B, T, {vocab_size}] |

B rows and T characters may be any numbers. The first window has a carry of zeros, and each further
one the new carry of the window before. A row with an id that no character has gives NaN.{documents}

charlstm does not read this format; export the run as `safetensors` too.
'''
_DOCUMENTS = """
The id {end_id} ends a document, and the carry starts from zeros there."""


class _Graph:
    """Nodes and constants of a graph. Names are also unique in the bodies of its loops."""

    def __init__(self, onnx: Any):
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._numbers = count()

    def body(self) -> "_Graph":
        """Return an empty graph that shares the constants and names of this one."""
        body = copy(self)
        body.nodes = []
        return body

    def new(self, kind: str) -> str:
        """Return a new name."""
        return f"{kind}_{next(self._numbers)}"

    def constant(self, value: Any) -> str:
        """Add a constant, and return its name."""
        name = self.new("constant")
        self.constants.append(self.onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, kind: str, *inputs: Any, outputs: int = 1, name: str = "", **more: Any) -> Any:
        """Add a node, and return the name of its output, or the names of its `outputs` > 1.

        Args:
          kind: the operator.
          inputs: names, '' for an optional input, or values of constants.
          outputs: the number of outputs.
          name: the name of a single output; a new one if empty.
          more: attributes of the operator.
        """
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        found = [name or self.new(kind.lower()) for _ in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(kind, names, found, **more))
        return found if outputs > 1 else found[0]

    def value(self, name: str, shape: list[Any], dtype: Any = np.float32) -> Any:
        """Return the description of an input or output; a text stands for any size."""
        helper = self.onnx.helper
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return helper.make_tensor_value_info(name, kind, shape)


def export(trained: Trained, out: epath.Path) -> None:
    """Write `trained` to the folder `out`.

    Raises:
      UserError: if the package onnx is not installed, or if `out` cannot be written.
    """
    model = trained.model
    loading = _LOADING.format(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        last_id=model.vocab_size - 1,
        documents="" if model.end_id is None else _DOCUMENTS.format(end_id=model.end_id),
    )
    texts = describe(trained, out, _FILES, loading)
    properties = {name: texts[name] for name in ("config.json", "vocab.json")}
    content = to_onnx(model, trained.params, properties).SerializeToString()
    write_folder(texts, {WEIGHTS: content}, out)


def to_onnx(model: CharLSTM, params: Any, properties: dict[str, str]) -> Any:
    """Return a model as an onnx.ModelProto with `properties` in its metadata.

    Raises:
      UserError: if the package onnx is not installed.
    """
    onnx = import_extra("onnx", "onnx", "the format onnx")
    graph, helper = _Graph(onnx), onnx.helper
    _add_model(graph, model, jax.device_get(params))
    shape_NBH = [model.num_layers, "B", model.hidden_size]
    inputs = [graph.value("ids", ["B", "T"], np.int64)]
    inputs += [graph.value(name, shape_NBH) for name in ("c", "h")]
    outputs = [graph.value("logits", ["B", "T", model.vocab_size])]
    outputs += [graph.value(name, shape_NBH) for name in ("new_c", "new_h")]
    proto = helper.make_model(
        helper.make_graph(graph.nodes, "charlstm", inputs, outputs, graph.constants),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="charlstm",
    )
    helper.set_model_props(proto, properties)
    return proto


class _Inputs(NamedTuple):
    """Names of what a layer reads."""

    ids_TB: str
    inputs_TBE: str  # empty: one-hot vectors of the ids
    keep_TB1: str  # false where the carry starts from zeros; empty: true everywhere


def _add_model(graph: _Graph, model: CharLSTM, params: Any) -> None:
    """Add the nodes from ids, c and h to logits, new_c and new_h."""
    is_low = graph.add("Less", "ids", model.vocab_size)
    is_valid = graph.add("And", is_low, graph.add("GreaterOrEqual", "ids", 0))
    ids_BT = graph.add("Where", is_valid, "ids", 0)
    ids_TB = graph.add("Transpose", ids_BT, perm=[1, 0])
    inputs_TBE = keep_TB1 = ""
    embedding_VE = embedding_of(params, model.input, model.vocab_size)
    if embedding_VE is not None:
        table_VE = graph.constant(embedding_VE)
        inputs_TBE = graph.add("Gather", table_VE, ids_TB)
    if model.end_id is not None:
        is_end_TB = graph.add("Equal", ids_TB, model.end_id)
        keep_TB1 = graph.add("Unsqueeze", graph.add("Not", is_end_TB), [2])
    layer, carries = _Inputs(ids_TB, inputs_TBE, keep_TB1), []
    for index in range(model.num_layers):
        carry = [graph.add("Gather", name, [index]) for name in ("c", "h")]
        layer_params = params[f"lstm_{index}"]
        if layer_params.keys() & {"scale", "norm"} or keep_TB1:
            hidden_TBH, *carry = _add_scan(graph, layer_params, layer, carry, model.norm_epsilon)
        else:
            hidden_TBH, *carry = _add_lstm(graph, layer_params, layer, carry)
        layer = layer._replace(inputs_TBE=hidden_TBH)
        carries.append(carry)
    logits_TBV = _add_dense(graph, hidden_TBH, params["dense"])
    if model.tie_embeddings:
        kernel_EV = graph.add("Transpose", table_VE, perm=[1, 0])
        logits_TBV = graph.add("MatMul", logits_TBV, kernel_EV)
        logits_TBV = graph.add("Add", logits_TBV, params["bias"])
    # Operators differ in what they make of an invalid id, and onnxruntime's LSTM drops a NaN.
    poison_BT = graph.add("Where", is_valid, np.float32(0), np.float32(np.nan))
    poison_B1 = graph.add("ReduceSum", poison_BT, [1])
    poison_B11 = graph.add("Unsqueeze", poison_B1, [2])
    logits_BTV = graph.add("Transpose", logits_TBV, perm=[1, 0, 2])
    graph.add("Add", logits_BTV, poison_B11, name="logits")
    for name, parts in zip(("new_c", "new_h"), zip(*carries, strict=True), strict=True):
        graph.add("Add", graph.add("Concat", *parts, axis=0), poison_B1, name=name)


def _add_lstm(graph: _Graph, params: Any, layer: _Inputs, carry: list[str]) -> tuple[str, str, str]:
    """Add ONNX's operator LSTM, and return hidden_TBH and the new carry c_1BH and h_1BH."""
    weights = to_layer(params)
    input_size, size = weights.input_kernel_EG.shape[0], weights.recurrent_kernel_HG.shape[0]
    inputs_TBE = layer.inputs_TBE or graph.add(
        "OneHot", layer.ids_TB, input_size, np.array([0, 1], np.float32)
    )
    order_G = np.concatenate([np.arange(size) + GATES.index(gate) * size for gate in "iofg"])
    kernel_1GE = weights.input_kernel_EG.T[None, order_G]
    recurrent_kernel_1GH = weights.recurrent_kernel_HG.T[None, order_G]
    # The operator adds two biases.
    biases_12G = np.concatenate([weights.bias_G[order_G], np.zeros_like(weights.bias_G)])[None]
    c_1BH, h_1BH = carry
    hidden_T1BH, h_1BH, c_1BH = graph.add(
        *("LSTM", inputs_TBE, kernel_1GE, recurrent_kernel_1GH, biases_12G, "", h_1BH, c_1BH),
        outputs=3,
        hidden_size=size,
    )
    return graph.add("Squeeze", hidden_T1BH, [1]), c_1BH, h_1BH


def _add_scan(
    graph: _Graph, params: Any, layer: _Inputs, carry: list[str], epsilon: float
) -> tuple[str, str, str]:
    """Add a loop over time, and return hidden_TBH and the new carry c_1BH and h_1BH."""
    weights = to_layer(params)
    size = weights.recurrent_kernel_HG.shape[0]
    sequences = {"sums": _add_rows(graph, layer, weights.input_kernel_EG, weights.bias_G)}
    if "scale" in params:
        ones_H = np.ones(size, np.float32)
        sequences["scale"] = _add_rows(graph, layer, params["scale"]["kernel"], ones_H)
    if layer.keep_TB1:
        sequences["keep"] = layer.keep_TB1
    body = graph.body()
    names = {name: body.new(name) for name in ("c", "h", *sequences)}
    c_BH, h_BH = _add_step(body, params, names, epsilon)
    hidden_BH = body.add("Identity", h_BH)
    widths = {"sums": 4 * size, "keep": 1}
    inputs = [
        body.value(name, ["B", widths.get(kind, size)], np.bool_ if kind == "keep" else np.float32)
        for kind, name in names.items()
    ]
    outputs = [body.value(name, ["B", size]) for name in (c_BH, h_BH, hidden_BH)]
    step = graph.onnx.helper.make_graph(body.nodes, body.new("step"), inputs, outputs)
    axis = [0]
    states = [graph.add("Squeeze", name, axis) for name in carry]
    c_BH, h_BH, hidden_TBH = graph.add(
        *("Scan", *states, *sequences.values()),
        outputs=3,
        body=step,
        num_scan_inputs=len(sequences),
    )
    return hidden_TBH, *(graph.add("Unsqueeze", name, axis) for name in (c_BH, h_BH))


def _add_rows(graph: _Graph, layer: _Inputs, kernel_EF: np.ndarray, bias_F: np.ndarray) -> str:
    """Add the product of a layer's input and a kernel, plus a bias."""
    if not layer.inputs_TBE:
        return graph.add("Gather", kernel_EF + bias_F[None], layer.ids_TB)
    return graph.add("Add", graph.add("MatMul", layer.inputs_TBE, kernel_EF), bias_F)


def _add_step(body: _Graph, params: Any, names: dict[str, str], epsilon: float) -> tuple[str, str]:
    """Add the equations of one time step, and return the new c_BH and h_BH."""
    c_BH, h_BH = names["c"], names["h"]
    if "keep" in names:
        c_BH, h_BH = (body.add("Where", names["keep"], x, np.float32(0)) for x in (c_BH, h_BH))
    if "scale" in names:
        h_BH = body.add("Mul", h_BH, names["scale"])
    product_BG = body.add("MatMul", h_BH, to_layer(params).recurrent_kernel_HG)
    if "norm" in params:
        square_BG = body.add("Mul", product_BG, product_BG)
        mean_B1 = body.add("ReduceMean", square_BG, [1])
        rms_B1 = body.add("Sqrt", body.add("Add", mean_B1, np.float32(epsilon)))
        product_BG = body.add("Mul", body.add("Div", product_BG, rms_B1), params["norm"]["gain"])
    sums_BG = body.add("Add", names["sums"], product_BG)
    i_BH, f_BH, g_BH, o_BH = body.add("Split", sums_BG, outputs=4, axis=1, num_outputs=4)
    i_BH, f_BH, o_BH = (body.add("Sigmoid", gate) for gate in (i_BH, f_BH, o_BH))
    new_BH = body.add("Mul", i_BH, body.add("Tanh", g_BH))
    c_BH = body.add("Add", body.add("Mul", f_BH, c_BH), new_BH)
    return c_BH, body.add("Mul", o_BH, body.add("Tanh", c_BH))


def _add_dense(graph: _Graph, inputs: str, params: Any) -> str:
    """Add a dense layer."""
    return graph.add("Add", graph.add("MatMul", inputs, params["kernel"]), params["bias"])
