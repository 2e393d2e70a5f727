"""Benchmarks of speed and quality."""

from charlstm.bench.command import describe_machine as describe_machine
from charlstm.bench.measure import FULL as FULL
from charlstm.bench.measure import QUICK as QUICK
from charlstm.bench.measure import Measurement as Measurement
from charlstm.bench.measure import Settings as Settings
from charlstm.bench.measure import measure as measure
