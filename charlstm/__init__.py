"""Character-level language models built on the LSTM, as pure JAX functions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from charlstm.data import Batch as Batch
    from charlstm.data import Streams as Streams
    from charlstm.data import Windows as Windows
    from charlstm.keys import derive_key as derive_key
    from charlstm.model import CharLSTM as CharLSTM
    from charlstm.model import hidden_states as hidden_states
    from charlstm.model import predict as predict
    from charlstm.model import zero_carry as zero_carry
    from charlstm.recurrence import LayerStates as LayerStates
    from charlstm.sample import make_sampler as make_sampler
    from charlstm.sample import sample_step as sample_step
    from charlstm.steps import TrainState as TrainState
    from charlstm.steps import evaluate as evaluate
    from charlstm.steps import init_state as init_state
    from charlstm.steps import make_eval_step as make_eval_step
    from charlstm.steps import make_train_step as make_train_step
    from charlstm.steps import make_train_steps as make_train_steps
    from charlstm.text import Vocab as Vocab

__version__ = "0.1.0"
_HOME = {
    "Batch": "data",
    "CharLSTM": "model",
    "LayerStates": "recurrence",
    "Streams": "data",
    "TrainState": "steps",
    "Vocab": "text",
    "Windows": "data",
    "derive_key": "keys",
    "evaluate": "steps",
    "hidden_states": "model",
    "init_state": "steps",
    "make_eval_step": "steps",
    "make_sampler": "sample",
    "make_train_step": "steps",
    "make_train_steps": "steps",
    "predict": "model",
    "sample_step": "sample",
    "zero_carry": "model",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that a mistyped flag is answered before JAX is imported.
    if name not in _HOME:
        raise AttributeError(f"module 'charlstm' has no attribute {name!r}")
    return getattr(import_module(f"charlstm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
