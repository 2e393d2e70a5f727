"""Training a run: setup, loop, validation and progress."""

from charlstm.training.loop import train as train
