"""Texts: sources, cleaning, vocabulary, corpora and batches. No module here imports JAX."""
