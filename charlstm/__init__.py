"""Character-level language models built on the LSTM, as pure JAX functions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from charlstm.data import Batch as Batch
    from charlstm.model import CharLSTM as CharLSTM
    from charlstm.model import zero_carry as zero_carry
    from charlstm.sample import make_sampler as make_sampler
    from charlstm.sample import sample_step as sample_step
    from charlstm.steps import TrainState as TrainState
    from charlstm.steps import init_state as init_state
    from charlstm.steps import make_eval_step as make_eval_step
    from charlstm.steps import make_train_step as make_train_step
    from charlstm.steps import make_train_steps as make_train_steps
    from charlstm.text import Vocab as Vocab

_HOME = {
    "Batch": "data",
    "CharLSTM": "model",
    "TrainState": "steps",
    "Vocab": "text",
    "init_state": "steps",
    "make_eval_step": "steps",
    "make_sampler": "sample",
    "make_train_step": "steps",
    "make_train_steps": "steps",
    "sample_step": "sample",
    "zero_carry": "model",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that a mistyped flag is answered before JAX is imported.
    if name not in _HOME:
        raise AttributeError(f"module 'charlstm' has no attribute {name!r}")
    return getattr(import_module(f"charlstm.{_HOME[name]}"), name)
