"""Spelling to phonemes: the shipped model, its exit classifiers and its records."""
