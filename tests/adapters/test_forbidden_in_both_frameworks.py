"""Forbidden classes hold the same tokens in JAX, as tables of a compiled program, and in PyTorch, where the host judges."""

import numpy as np
import pytest
import torch

import riskcal_adapters.jax
import riskcal_adapters.torch
from riskcal import ExitPolicy
from riskcal.serving import Inside, Pattern, Tokens

LENGTH, ROWS = 16, 24
WORDS = ["banana", "calibrate", "risk", "through", "layer", "zyzzyva", "exit", "abracadabra"] * 3
VOWEL, NUMBER, NAME = Pattern("^ ?[AEIOU]"), Inside("number"), Inside("identifier", prompt=True)


@pytest.fixture(scope="module")
def both():
    torch.set_num_threads(1)
    return riskcal_adapters.torch.load_example("g2p"), riskcal_adapters.jax.load_example("g2p")


def policies(**fields):
    rules = [[], [VOWEL], [NUMBER, Tokens(range(3, 40, 2))], [NAME]]
    return [ExitPolicy(threshold=0.3, forbidden=rules[row % 4], **fields) for row in range(ROWS)]


@pytest.mark.parametrize("measure", ["softmax", "state"])
def test_tokens_and_exits_are_the_same(both, measure):
    in_torch, in_jax = both
    ids, mask = in_jax.encode(WORDS)
    asked = policies(measure=measure)
    theirs = in_torch.generate(torch.as_tensor(ids), torch.as_tensor(mask), asked, LENGTH)
    ours = in_jax.generate(ids, mask, asked, LENGTH)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.exit_layers, theirs.exit_layers)
    np.testing.assert_allclose(ours.confidence, theirs.confidence, atol=1e-4)
    np.testing.assert_allclose(ours.refused, theirs.refused, atol=1e-4)
    held = np.array([len(one.forbidden) > 0 for one in asked])
    depth = [ours.exit_layers[rows][ours.exit_layers[rows] > 0].mean() for rows in (held, ~held)]
    assert depth[0] > depth[1] + 0.5  # some were held
    assert depth[0] < in_jax.n_layers - 0.5  # and some were not


def test_traces_have_no_confidence_where_a_token_is_held(both):
    ids, mask = both[1].encode(WORDS[:8])
    some, every = "some", "every"  # after a spelling each phoneme goes on with a name
    for rules, held in (
        ([VOWEL], some),
        ([NUMBER, Tokens(range(29, 68, 2))], some),
        ([NUMBER, NAME], every),
    ):
        asked = ExitPolicy(forbidden=rules)
        given = torch.as_tensor(ids), torch.as_tensor(mask)
        theirs = both[0].trace(*given, max_new_tokens=LENGTH, policy=asked)
        ours = both[1].trace(ids, mask, max_new_tokens=LENGTH, policy=asked)
        np.testing.assert_allclose(ours.confidence, theirs.confidence, atol=1e-4)
        share = np.isnan(ours.confidence[:, :-1]).mean()
        assert 0 < share < 1 if held == some else share == 1
