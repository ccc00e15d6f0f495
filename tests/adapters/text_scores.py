"""Scores that tests pickle: processes find them by the name of this module."""

import difflib

LOADED = []


def ratio(scale):
    """A "model" that is slow to load."""
    LOADED.append(scale)
    return lambda candidate, reference: (
        scale * difflib.SequenceMatcher(None, candidate, reference).ratio()
    )


def constant(value):
    return lambda candidate, reference: value
