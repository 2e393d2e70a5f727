"""Benchmarks of speed and quality."""
