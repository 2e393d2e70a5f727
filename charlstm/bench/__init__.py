"""Benchmarks of speed and quality."""

from charlstm.bench.measure import FULL, QUICK, Measurement, Settings, describe_machine, measure

__all__ = ["FULL", "QUICK", "Measurement", "Settings", "describe_machine", "measure"]
