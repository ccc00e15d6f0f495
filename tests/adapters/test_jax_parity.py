"""JAX and PyTorch on the shipped model: the same logits, tokens, exits, traces and records."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import torch

import riskcal
import riskcal_adapters.jax
import riskcal_adapters.torch
from riskcal import Decaying, ExitPolicy, Runs
from riskcal_adapters import record
from riskcal_adapters.jax import layers
from riskcal_adapters.torch.training import teacher_forced

LENGTH = 32  # one size for all programs here
THRESHOLDS = (0.0, 0.3, 0.6, 0.9, 1.0)
#: Confidences of the two frameworks differ by rounding; a decision may differ where one is this close to its threshold.
NEAR = 1e-4


@pytest.fixture(scope="module")
def words():
    """300 pronounceable words of 3 to 12 letters, in no dictionary's order."""
    rng = np.random.default_rng(11)
    onsets, nuclei, codas = (
        ["b", "str", "k", "m", "ph", "th", "gr", "w", ""],
        ["a", "e", "ou", "i"],
        ["", "n", "ck", "st"],
    )
    made = [
        "".join(
            rng.choice(part) for _ in range(rng.integers(1, 4)) for part in (onsets, nuclei, codas)
        )
        + "e"
        for _ in range(900)
    ]
    return [word for word in dict.fromkeys(made) if 3 <= len(word) <= 12][:300]


@pytest.fixture(scope="module")
def in_torch():
    torch.set_num_threads(1)
    return riskcal_adapters.torch.load_example("g2p")


@pytest.fixture(scope="module")
def in_jax():
    return riskcal_adapters.jax.load_example("g2p")


def policies():
    schedules = (riskcal.Constant(), Decaying(temperature=4.0, max_length=LENGTH))
    return [
        ExitPolicy.full_model(),
        *(ExitPolicy(threshold=t, schedule=s) for s in schedules for t in THRESHOLDS),
    ]


def test_texts_become_the_same_tokens_and_tokens_the_same_texts(in_torch, in_jax, words):
    for one, other in zip(in_torch.encode(words), in_jax.encode(words), strict=True):
        np.testing.assert_array_equal(one, other)
    tokens = in_jax.generate(*in_jax.encode(words[:8]), max_new_tokens=LENGTH).tokens
    assert in_jax.decode(tokens) == in_torch.decode(torch.as_tensor(tokens))
    assert in_jax.weights == in_torch.weights


def test_logits_of_all_layers_are_the_same(in_torch, in_jax, words):
    ids, mask = in_jax.encode(words[:4])
    spoken = in_torch.generate(
        torch.as_tensor(ids), torch.as_tensor(mask), max_new_tokens=12
    ).tokens
    given = torch.nn.functional.pad(spoken[:, :-1], (1, 0))
    with torch.inference_mode():
        exact = teacher_forced(
            in_torch.model.double(), torch.as_tensor(ids), torch.as_tensor(mask), given
        ).numpy()
    in_torch.model.float()
    static, params, _ = in_jax._whole(oracle=False)

    @functools.partial(jax.jit, static_argnums=0)
    def forced(static, params, ids, mask, given):
        context = layers.read_prompt(static.shape, params, ids, mask, given.shape[1])

        def step(own, at):
            position, token = at
            seen = layers.at_position(static.shape, params, context, position, own)
            states, memory = layers.all_layers(static.shape, params, seen, params.embedding[token])
            written = jax.lax.dynamic_update_index_in_dim(own, memory, position, -2)
            return written, layers.logits(static.shape, params, states)

        return jax.lax.scan(step, context.own, (jnp.arange(given.shape[1]), given.T))[1]

    logits = np.asarray(
        forced(
            static, params, jnp.asarray(ids), jnp.asarray(mask, bool), jnp.asarray(given.numpy())
        )
    )
    difference = np.abs(logits.transpose(1, 2, 0, 3) - exact).max()
    print(
        f"largest difference {difference:.2e}, {difference / exact.std():.2e} of the standard deviation {exact.std():.2f}"
    )
    assert difference <= 2e-4 * exact.std()


def test_tokens_and_exits_are_the_same_on_300_words(in_torch, in_jax, words):
    """A row may differ only from where a confidence was within 1e-4 of its threshold; on these words none does."""
    assert len(words) == 300
    near = 0
    ids, mask = in_jax.encode(words)
    for policy in policies():
        needed = policy.exit_thresholds(in_jax.n_layers, LENGTH)[:, 0]
        theirs = in_torch.generate(torch.as_tensor(ids), torch.as_tensor(mask), policy, LENGTH)
        eights = [slice(start, min(start + 8, 300)) for start in range(0, 300, 8)]
        for part in eights + [slice(i, i + 1) for i in range(300)]:  # in batches of 8, and alone
            ours = in_jax.generate(ids[part], mask[part], policy, LENGTH)
            near += apart(ours, theirs, part, needed)
    print(f"rows that differ near a threshold: {near}")
    assert near == 0


def apart(ours, theirs, part, needed):
    """How many rows differ from where a confidence was within 1e-4 of its threshold; any other that differs fails."""
    length = ours.tokens.shape[1]
    tokens, exits, sure, refused = (
        getattr(theirs, name)[part].numpy()
        for name in ("tokens", "exit_layers", "confidence", "refused")
    )
    assert not exits[:, length:].any()
    same = (ours.tokens == tokens[:, :length]) & (ours.exit_layers == exits[:, :length])
    for row in np.flatnonzero(~same.all(1)):
        at = int(np.flatnonzero(~same[row])[0])
        seen = np.array(
            [sure[row, at], refused[row, at], ours.confidence[row, at], ours.refused[row, at]]
        )
        assert np.nanmin(np.abs(seen - needed[at])) <= NEAR, (row, at, seen, needed[at])
    agreeing = same.all(1)
    np.testing.assert_allclose(
        ours.confidence[agreeing], sure[agreeing, :length], rtol=0, atol=NEAR
    )
    np.testing.assert_allclose(
        ours.refused[agreeing], refused[agreeing, :length], rtol=0, atol=NEAR
    )
    return int((~agreeing).sum())


@pytest.mark.parametrize("measure", ["softmax", "classifier"])
def test_traces_are_the_same(in_torch, in_jax, words, measure):
    ids, mask = in_jax.encode(words[:8])
    asked = ExitPolicy(measure=measure)
    ours = in_jax.trace(ids, mask, LENGTH, policy=asked).to_frame()
    theirs = in_torch.trace(
        torch.as_tensor(ids), torch.as_tensor(mask), LENGTH, policy=asked
    ).to_frame()
    pd.testing.assert_frame_equal(ours, theirs, check_exact=False, atol=NEAR, rtol=0)


def test_records_are_interchangeable(in_torch, in_jax, words, tmp_path):
    grid = np.round(np.arange(0, 1, 0.1), 1)
    settings = {"max_new_tokens": LENGTH, "batch_size": 8, "progress": False}
    paths = [
        record(words[:40], lambda decoder=decoder: decoder, grid, tmp_path / name, **settings)
        for name, decoder in (("jax", in_jax), ("torch", in_torch))
    ]
    ours, theirs = map(Runs.read, paths)
    pd.testing.assert_frame_equal(
        ours.to_frame().drop(columns="seconds"), theirs.to_frame().drop(columns="seconds")
    )
    assert ours.thresholds.tolist() == theirs.thresholds.tolist()
    first, second = (riskcal.calibrate(runs, delta=0.3).policy() for runs in (ours, theirs))
    assert first.model_copy(update={"certificate": None}) == second.model_copy(
        update={"certificate": None}
    )
    assert first.certificate.pvalue == second.certificate.pvalue
    halves = [ours.to_frame(), theirs.to_frame()]
    mixed = pd.concat([half[half["prompt"] % 2 == i] for i, half in enumerate(halves)])
    assert (
        riskcal.calibrate(Runs.from_frame(mixed), delta=0.3).policy().threshold == first.threshold
    )


def test_the_shipped_model_with_long_outputs_is_the_same_in_both():
    ours, theirs = (
        framework.load_example("numbers")
        for framework in (riskcal_adapters.jax, riskcal_adapters.torch)
    )
    assert ours.weights == theirs.weights
    texts = ["fr:1980", "de:7431", "en:90817"]
    policy = ExitPolicy(threshold=0.9)
    mine = ours.generate(*ours.encode(texts), policy=policy, max_new_tokens=96)
    other = theirs.generate(*theirs.encode(texts), policy=policy, max_new_tokens=96)
    np.testing.assert_array_equal(mine.tokens, other.tokens.numpy())
    np.testing.assert_array_equal(mine.exit_layers, other.exit_layers.numpy())
