"""Sizes of a pruned head: the published table, and what every form must keep to."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from riskcal import Pruning, RiskcalError

FORMS = ("fixed", "decaying", "adaptive", "adaptive-code")


def sizes(pruning, layers, n_layers=24, vocabulary=32_128, start=1):
    return [int(pruning.kept(layer, n_layers, vocabulary, start=start)) for layer in layers]


def test_the_decaying_form_is_the_closed_formula():
    """Computed from the formula in the blog post's image, k1 = 35,000, k* = 250, 24 layers; the post cites 2781 and 842."""
    layers = (1, 2, 3, 7, 12, 15, 17, 19, 24)
    assert sizes(Pruning(), layers) == [5153, 2781, 1904, 842, 496, 398, 351, 315, 250]


def test_the_fixed_form_keeps_what_was_kept_at_the_start():
    assert sizes(Pruning("fixed"), (2, 7, 24), start=2) == [2781] * 3
    assert sizes(Pruning("fixed"), (7, 8, 24), start=7) == [842] * 3


def test_the_authors_adaptive_form_never_binds_and_ours_does():
    sure = np.array([0.0, 0.5, 1.0])
    arguments = {"start": 2, "confidence": sure}
    assert Pruning("adaptive-code").kept(3, 24, 32_128, **arguments).tolist() == [2781] * 3
    assert Pruning("adaptive").kept(3, 24, 32_128, **arguments).tolist() == [
        2781,
        math.floor(2781 * 0.55),
        278,
    ]


def test_unknown_confidence_prunes_nothing_more():
    assert (
        Pruning("adaptive")
        .kept(3, 24, 32_128, start=2, confidence=np.array([math.nan, -3.0]))
        .tolist()
        == [2781] * 2
    )


@given(
    form=st.sampled_from(FORMS),
    smallest=st.integers(2, 300),
    more=st.integers(0, 40_000),
    vocabulary=st.integers(2, 40_000),
    depth=st.integers(1, 48),
    data=st.data(),
)
def test_sizes_stay_within_the_vocabulary_and_never_grow(
    form, smallest, more, vocabulary, depth, data
):
    pruning = Pruning(form, smallest + more, smallest)
    start = data.draw(st.integers(1, depth))
    confidence = data.draw(st.floats(0, 1))
    kept = [
        int(pruning.kept(i, depth, vocabulary, start=start, confidence=confidence))
        for i in range(start, depth + 1)
    ]
    assert all(1 <= size <= vocabulary for size in kept)
    assert kept == sorted(kept, reverse=True)
    surer = int(
        pruning.kept(depth, depth, vocabulary, start=start, confidence=min(1.0, confidence + 0.1))
    )
    assert surer <= kept[-1]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"form": "shrinking"}, "form"),
        ({"smallest": 1}, "smallest"),
        ({"largest": 10, "smallest": 20}, "largest"),
    ],
)
def test_bad_settings_are_named(fields, named):
    with pytest.raises(RiskcalError, match=named):
        Pruning(**fields)


def test_adaptive_needs_a_confidence():
    with pytest.raises(RiskcalError, match="confidence"):
        Pruning("adaptive").kept(3, 8, 100, start=2)
