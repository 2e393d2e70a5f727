"""Benchmarks of speed and quality."""

from charlstm.bench.command import describe_machine
from charlstm.bench.measure import FULL, QUICK, Measurement, Settings, measure

__all__ = ["FULL", "QUICK", "Measurement", "Settings", "describe_machine", "measure"]
