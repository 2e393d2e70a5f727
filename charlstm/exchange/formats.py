"""The formats of launch/export.py. This module does not import JAX."""

# The module of each format, whose function export(trained, out) writes it.
FORMATS = {
    "safetensors": "charlstm.exchange.safetensors",
    "keras": "charlstm.exchange.keras",
    "torch": "charlstm.exchange.torch",
    "html": "charlstm.exchange.html",
    "onnx": "charlstm.exchange.onnx",
    "stablehlo": "charlstm.exchange.stablehlo",
}
# Those of a plain LSTM only.
PLAIN = ("keras", "torch")
# The types of stored weights, the default first, where there is a choice.
WEIGHTS = {"safetensors": ("float32", "float16"), "html": ("int16", "float32", "int8")}
