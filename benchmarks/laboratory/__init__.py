"""Simulated worlds whose truth is known: whether a procedure keeps its word there, and how much of the possible it gets."""
