"""Character-level language models built on the LSTM, as pure JAX functions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from charlstm.config import base_config as base_config
    from charlstm.data.batches import Batch as Batch
    from charlstm.data.batches import Streams as Streams
    from charlstm.data.batches import Windows as Windows
    from charlstm.data.batches import training_batches as training_batches
    from charlstm.data.vocab import Vocab as Vocab
    from charlstm.keys import derive_key as derive_key
    from charlstm.lstm.reference import LayerStates as LayerStates
    from charlstm.model import CharLSTM as CharLSTM
    from charlstm.model import hidden_states as hidden_states
    from charlstm.model import model_from_config as model_from_config
    from charlstm.model import predict as predict
    from charlstm.model import zero_carry as zero_carry
    from charlstm.optim import averaged_params as averaged_params
    from charlstm.optim import make_optimizer as make_optimizer
    from charlstm.optim import make_schedule as make_schedule
    from charlstm.sampling import make_sampler as make_sampler
    from charlstm.sampling import sample_step as sample_step
    from charlstm.steps import TrainState as TrainState
    from charlstm.steps import evaluate as evaluate
    from charlstm.steps import init_state as init_state
    from charlstm.steps import make_eval_step as make_eval_step
    from charlstm.steps import make_train_step as make_train_step
    from charlstm.steps import make_train_steps as make_train_steps

__version__ = "0.1.0"
_HOME = {
    "Batch": "data.batches",
    "CharLSTM": "model",
    "LayerStates": "lstm.reference",
    "Streams": "data.batches",
    "TrainState": "steps",
    "Vocab": "data.vocab",
    "Windows": "data.batches",
    "averaged_params": "optim",
    "base_config": "config",
    "derive_key": "keys",
    "evaluate": "steps",
    "hidden_states": "model",
    "init_state": "steps",
    "make_eval_step": "steps",
    "make_optimizer": "optim",
    "make_sampler": "sampling",
    "make_schedule": "optim",
    "make_train_step": "steps",
    "make_train_steps": "steps",
    "model_from_config": "model",
    "predict": "model",
    "sample_step": "sampling",
    "training_batches": "data.batches",
    "zero_carry": "model",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    # Imported on first use: a launcher reports a mistyped flag without importing JAX.
    if name not in _HOME:
        raise AttributeError(f"module 'charlstm' has no attribute {name!r}")
    return getattr(import_module(f"charlstm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
