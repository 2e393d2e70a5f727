"""A search over settings: train with each combination, compare on text that is not reported."""

from charlstm.sweep.search import Results as Results
from charlstm.sweep.search import run as run
from charlstm.sweep.table import Combination as Combination
