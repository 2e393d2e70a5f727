"""Console output, paths and tables."""
