"""Sampled decoding: the exact law of the next token, and random numbers that policies and batches have in common."""

import numpy as np
import pytest
import torch
from exit_reference import Reference, middling, truncated
from scipy import stats
from t5_reference import FULL, LENGTH, assert_row, hugging_face, prompts

from riskcal import ExitPolicy
from riskcal.policy import Sampling
from riskcal.pruning import Pruning
from riskcal_adapters.torch import EarlyExitT5
from riskcal_adapters.torch.sampling import draw, noise_keys, nucleus
from riskcal_adapters.torch.scores import Scores

LEVEL = 1e-4  # of the tests below: with their fixed seeds they pass or fail for good


def law(logits, sampling):
    """Probabilities by the definition: temperature first, then the smallest set of likeliest tokens of mass top_p."""
    weights = np.exp(
        np.float64(logits) / sampling.temperature
        - np.max(np.float64(logits) / sampling.temperature)
    )
    p = weights / weights.sum()
    kept, total = np.zeros(len(p), dtype=bool), 0.0
    for token in np.argsort(-p, kind="stable"):
        if total >= sampling.top_p:
            break
        kept[token], total = True, total + p[token]
    p = np.where(kept, p, 0.0)
    return p / p.sum()


LOGITS = [2.0, 1.0, 0.5, 0.5, -0.5, -1.0, -3.0]
LAWS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=2.0),
    Sampling(top_p=0.8),
    Sampling(top_p=0.5, temperature=1.5),
]


@pytest.mark.parametrize("sampling", LAWS, ids=str)
def test_draws_follow_the_next_tokens_law(sampling):
    n = 2000
    logits = torch.tensor([LOGITS])
    counts = np.bincount(draw(Scores(logits), [0] * n, list(range(n)), 0, sampling, 7), minlength=7)
    p = law(LOGITS, sampling)
    assert counts[p == 0].sum() == 0, "a token outside of the nucleus was drawn"
    assert stats.chisquare(counts[p > 0], n * p[p > 0]).pvalue > LEVEL


def test_the_nucleus_is_the_smallest_set_of_that_mass_the_token_that_reaches_it_included():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
    for top_p, size in ((0.01, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1.0, 4)):
        assert int(nucleus(logits, Sampling(top_p=top_p)).isfinite().sum()) == size
    tied = nucleus(torch.zeros(5), Sampling(top_p=0.5))
    assert tied.isfinite().tolist() == [True, True, True, False, False], (
        "the lowest ids among equals"
    )


def test_draws_of_a_pruned_head_are_the_same_tokens_where_the_logits_are():
    """A token's noise belongs to its id, not to its rank: with all tokens kept the draws are the same."""
    n, order = 300, torch.tensor([[4, 0, 6, 2, 1, 3, 5]])
    logits = torch.tensor([LOGITS])
    full = draw(Scores(logits), [0] * n, list(range(n)), 3, Sampling(), 7)
    ranked = draw(Scores(logits[:, order[0]], order), [0] * n, list(range(n)), 3, Sampling(), 7)
    assert full == ranked
    part = torch.tensor([[0, 1, 4]])
    pruned = draw(Scores(logits[:, part[0]], part), [0] * n, list(range(n)), 3, Sampling(), 7)
    assert set(pruned) == {0, 1, 4}
    assert all(one == other for one, other in zip(full, pruned, strict=True) if one in (0, 1, 4))


def distinct_prompts(n, seed=0):
    rows = np.unique(np.random.default_rng(seed).integers(2, 41, size=(2 * n, 3)), axis=0)
    return torch.tensor(np.random.default_rng(seed).permutation(rows)[:n])


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.7), Sampling(top_p=0.6, seed=5)], ids=str
)
@pytest.mark.parametrize("exits", [False, True], ids=["full model", "early exits"])
def test_sampled_decoding_follows_the_law_at_every_prompt_and_position(tiny_t5, sampling, exits):
    """Each draw, put into its own law's distribution function, is uniform, and those of two positions are independent."""
    n = 500
    input_ids = distinct_prompts(n)
    policy = ExitPolicy.static(2, sampling=sampling) if exits else ExitPolicy(sampling=sampling)
    generation = EarlyExitT5(tiny_t5).generate(input_ids, policy=policy, max_new_tokens=2)
    real = (generation.exit_layers > 0).all(1).numpy()
    assert real.mean() > 0.8
    logits = layer_logits(tiny_t5, input_ids, generation.tokens[:, :1], 2 if exits else None)
    generator, uniform = np.random.default_rng(1), np.empty((n, 2))
    for row in range(n):
        for position in range(2):
            p, token = law(logits[row, position], sampling), int(generation.tokens[row, position])
            assert p[token] > 0 or not real[row]
            uniform[row, position] = p[:token].sum() + p[token] * generator.random()
    cells = np.minimum((uniform[real] * 5).astype(int), 4)
    counts = np.histogram2d(*cells.T, bins=[np.arange(6)] * 2)[0]
    assert (
        stats.chisquare(
            np.bincount((uniform[:, 0] * 20).astype(int).clip(0, 19), minlength=20)
        ).pvalue
        > LEVEL
    )
    assert stats.chi2_contingency(counts).pvalue > LEVEL


@torch.inference_mode()
def layer_logits(model, input_ids, first, depth):
    """(B, 2, V) next-token logits of Hugging Face's model at the first two positions, after ``depth`` layers."""
    cut = model if depth is None else truncated(model, depth)
    tokens = torch.cat([torch.zeros_like(first), first], 1)
    return cut(input_ids=input_ids, decoder_input_ids=tokens, use_cache=False).logits.numpy()


def test_early_and_full_runs_draw_with_common_random_numbers(ending):
    decoder = EarlyExitT5(ending)
    sampling = Sampling(seed=3)
    full = decoder.generate(
        *prompts(7), policy=ExitPolicy(sampling=sampling), max_new_tokens=LENGTH
    )
    # nothing exits, whatever else the policy says: the same draws
    for fields in (
        {"threshold": 9.0},
        {"threshold": 9.0, "cache": "deferred"},
        {"threshold": 9.0, "batching": "regroup"},
    ):
        never = decoder.generate(
            *prompts(7), policy=ExitPolicy(sampling=sampling, **fields), max_new_tokens=LENGTH
        )
        assert never.tokens.equal(full.tokens)
    # and exits whose logits are the last layer's draw its tokens; other random numbers would not
    last = ExitPolicy(threshold=0.2, cache="deferred", emits="last", sampling=sampling)
    same = decoder.generate(*prompts(7), policy=last, max_new_tokens=LENGTH)
    assert same.tokens.equal(full.tokens)
    assert same.exit_layers.float().mean() < full.exit_layers.float().mean()


def test_close_laws_draw_the_same_tokens_far_more_often_than_independent_draws_would(tiny_t5):
    """The last two layers of one model: tokens coincide more than with another seed; the seed is all that differs."""
    input_ids = distinct_prompts(600, seed=1)
    decoder = EarlyExitT5(tiny_t5)
    one, common, other = (
        decoder.generate(input_ids, policy=policy, max_new_tokens=1).tokens
        for policy in (
            ExitPolicy(sampling=Sampling(seed=0)),
            ExitPolicy.static(decoder.n_layers - 1, sampling=Sampling(seed=0)),
            ExitPolicy.static(decoder.n_layers - 1, sampling=Sampling(seed=1)),
        )
    )
    with_common, without = (one == common).sum().item(), (one == other).sum().item()
    assert (
        stats.fisher_exact(
            [[with_common, 600 - with_common], [without, 600 - without]], "greater"
        ).pvalue
        < LEVEL
    )


@pytest.mark.parametrize(
    "fields",
    [{}, {"batching": "regroup"}, {"pruning": Pruning("fixed", 20, 3)}, {"cache": "deferred"}],
    ids=str,
)
def test_a_sampled_row_is_its_run_alone_on_either_side_of_padding(ending, fields):
    policy = middling(ending, sampling=Sampling(temperature=1.3, top_p=0.9, seed=2), **fields)
    decoder = EarlyExitT5(ending)
    for side in ("left", "right"):
        input_ids, mask = prompts(4, side)
        together = decoder.generate(input_ids, mask, policy=policy, max_new_tokens=LENGTH)
        for row, real in enumerate(mask.bool()):
            alone = decoder.generate(
                input_ids[row : row + 1, real], policy=policy, max_new_tokens=LENGTH
            )
            assert_row(together, row, alone)


def test_noise_belongs_to_the_prompt_the_position_and_the_seed():
    tokens = np.array([[5, 6, 7, 0], [0, 5, 6, 7], [5, 6, 0, 7], [5, 6, 7, 7]])
    mask = tokens > 0
    keys = noise_keys(tokens, mask)
    assert keys[0] == keys[1] == keys[2]
    assert keys[3] != keys[0]
    assert noise_keys(tokens[:1], np.ones((1, 4), dtype=bool))[0] != keys[0], (
        "an unmasked token is part of the prompt"
    )
    wide = torch.zeros(1, 10_000)
    drawn = {
        (key, position, seed): draw(
            Scores(wide), [0], [key], position, Sampling(seed=seed), 10_000
        )[0]
        for key in keys[2:]
        for position in (0, 1)
        for seed in (0, 1)
    }
    assert len(set(drawn.values())) == len(drawn), "one of them does not enter"
    again = draw(Scores(wide), [0], [keys[3]], 1, Sampling(seed=1), 10_000)[0]
    assert again == drawn[keys[3], 1, 1]


def test_a_seed_changes_the_draws_and_a_prompt_that_repeats_does_not(ending):
    decoder = EarlyExitT5(ending)
    input_ids, mask = prompts(4)
    input_ids[2:], mask[2:] = input_ids[:2].clone(), mask[:2].clone()
    zero, one = (
        decoder.generate(
            input_ids,
            mask,
            policy=ExitPolicy(sampling=Sampling(temperature=2.0, seed=s)),
            max_new_tokens=LENGTH,
        )
        for s in (0, 1)
    )
    assert zero.tokens[:2].equal(zero.tokens[2:])
    length = min(zero.tokens.shape[1], one.tokens.shape[1])
    assert not zero.tokens[:, :length].equal(one.tokens[:, :length])


def test_cold_sampling_and_a_narrow_nucleus_are_greedy(ending):
    decoder = EarlyExitT5(ending)
    for sampling in (Sampling(temperature=1e-6), Sampling(top_p=1e-9, temperature=3.0)):
        generation = decoder.generate(
            *prompts(7), policy=ExitPolicy(sampling=sampling), max_new_tokens=LENGTH
        )
        assert generation.tokens.equal(hugging_face(ending, *prompts(7)))
        greedy, sampled = (
            decoder.generate(*prompts(3), policy=middling(ending, sampling=s), max_new_tokens=8)
            for s in (None, sampling)
        )
        assert greedy.tokens.equal(sampled.tokens)
        assert greedy.exit_layers.equal(sampled.exit_layers)


def test_confidences_are_those_of_the_logits_as_they_are(ending):
    """Neither the temperature nor the nucleus enters a confidence: the first position is as in greedy decoding."""
    one, _ = prompts(1)
    hot, greedy = (
        EarlyExitT5(ending).generate(one, policy=ExitPolicy.static(2, sampling=s), max_new_tokens=1)
        for s in (Sampling(temperature=5.0, top_p=0.3), None)
    )
    # to rounding: one row that draws nothing is decoded by another loop
    torch.testing.assert_close(hot.confidence, greedy.confidence, rtol=1e-5, atol=0)


def test_traces_of_sampled_decoding_follow_the_sampled_path(ending):
    decoder, sampling = EarlyExitT5(ending), Sampling(temperature=1.5, seed=4)
    full = decoder.generate(*prompts(4), policy=ExitPolicy(sampling=sampling), max_new_tokens=8)
    traces = decoder.trace(*prompts(4), max_new_tokens=8, policy=ExitPolicy(sampling=sampling))
    lengths = (full.exit_layers > 0).sum(1)
    assert np.bincount(traces.prompt).tolist() == lengths.tolist()
    assert np.asarray(traces.agrees)[:, -1].all()
    last = np.asarray(traces.confidence)[:, -1]
    for row, length in enumerate(lengths.tolist()):
        mine = np.flatnonzero(np.asarray(traces.prompt) == row)
        np.testing.assert_allclose(last[mine], full.confidence[row, :length], rtol=0, atol=1e-6)
    greedy = Reference(ending).generate([prompts(1)[0][0]], FULL, 8)[0].tokens
    assert full.tokens[0, : len(greedy)].tolist() != greedy
