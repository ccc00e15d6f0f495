"""Speculative decoding: the full model's tokens whatever is drafted, greedy and sampled, and the layers that are claimed."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from t5_reference import LENGTH, ending_early, hugging_face, prompts
from transformers import T5Config, T5ForConditionalGeneration

from riskcal import ExitPolicy, RiskcalError, Sampling
from riskcal_adapters.torch import EarlyExitT5, Speculation, speculation

LENGTHS = [1, 2, 5, 40, "adaptive"]


def weak_above(
    model: T5ForConditionalGeneration, layer: int, factor: float
) -> T5ForConditionalGeneration:
    """The same model, but the layers above this one add only a share to the state: drafts agree with it often."""
    weak = copy.deepcopy(model)
    for block in weak.decoder.block[layer:]:
        for out in (
            block.layer[0].SelfAttention.o,
            block.layer[1].EncDecAttention.o,
            block.layer[2].DenseReluDense.wo,
        ):
            out.weight.data *= factor
    return weak


@pytest.fixture(scope="module")
def decoder(tiny_t5):
    """Drafts are sometimes right and sometimes wrong, at every layer; texts end, or go to the limit."""
    return EarlyExitT5(ending_early(weak_above(tiny_t5, 1, 0.3)))


def spied(monkeypatch, name):
    """What a function of the module returned, call by call."""
    returned, function = [], getattr(speculation, name)

    def spy(*arguments):
        returned.append(function(*arguments))
        return returned[-1]

    monkeypatch.setattr(speculation, name, spy)
    return returned


# -- the tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_row_29_greedy_tokens_are_the_full_models(decoder, length):
    input_ids, mask = prompts(20, seed=10 * LENGTHS.index(length) + decoder.n_layers)  # 200 in all
    full = decoder.generate(input_ids, mask, max_new_tokens=LENGTH).tokens
    right = wrong = 0
    for layer in range(1, decoder.n_layers):
        speculated = decoder.speculate(
            input_ids, mask, draft_layer=layer, draft_length=length, max_new_tokens=LENGTH
        )
        assert speculated.tokens.equal(full)
        right += int(speculated.accepted.sum())
        wrong += int((speculated.drafted - speculated.accepted).sum())
    assert min(right, wrong) > 20


@pytest.mark.parametrize("side", ["left", "right"])
def test_row_29_greedy_tokens_are_hugging_faces(decoder, side):
    input_ids, mask = prompts(7, side)
    speculated = decoder.speculate(input_ids, mask, draft_layer=2, max_new_tokens=LENGTH)
    assert speculated.tokens.equal(hugging_face(decoder.model, input_ids, mask))


@pytest.mark.parametrize("confidence", [0.05, 0.2, 0.6, 1.0])
def test_tokens_are_the_same_however_sure_drafts_must_be(decoder, confidence):
    input_ids, mask = prompts(10)
    full = decoder.generate(input_ids, mask, max_new_tokens=LENGTH).tokens
    for layer in range(1, decoder.n_layers):
        speculated = decoder.speculate(
            input_ids, mask, draft_layer=layer, draft_confidence=confidence, max_new_tokens=LENGTH
        )
        assert speculated.tokens.equal(full)


def test_row_29_ends_inside_drafts(decoder, monkeypatch):
    """The draft layer ends texts that go on, goes on where they end, and is right about other ends."""
    drafts, chosen = spied(monkeypatch, "_draft"), spied(monkeypatch, "_verify")
    end = decoder.model.generation_config.eos_token_id
    input_ids, mask = prompts(50)
    speculated = decoder.speculate(
        input_ids, mask, draft_layer=1, draft_length=4, max_new_tokens=30
    )
    assert speculated.tokens.equal(decoder.generate(input_ids, mask, max_new_tokens=30).tokens)
    stopped = [len(drafted) < 4 for drafted, _ in drafts]  # by an end token: the limit is far
    held = [len(tokens) > len(drafted) for (drafted, _), tokens in zip(drafts, chosen, strict=True)]
    ended = [tokens[-1] == end for tokens in chosen]
    outcomes = set(zip(stopped, held, ended, strict=True))
    assert {(True, True, False), (True, True, True), (False, False, True)} <= outcomes


@pytest.mark.parametrize("limit", [1, 2, 3, 5, LENGTH])
def test_the_length_limit_inside_a_draft(decoder, limit):
    input_ids, mask = prompts(5)
    for length in (1, 4, 40):
        speculated = decoder.speculate(
            input_ids, mask, draft_layer=2, draft_length=length, max_new_tokens=limit
        )
        assert speculated.tokens.equal(
            decoder.generate(input_ids, mask, max_new_tokens=limit).tokens
        )


def test_one_token_is_not_drafted(decoder):
    """The rate of nothing is no error (LayerSkip's code divides by zero)."""
    speculated = decoder.speculate(*prompts(3), draft_layer=1, draft_length=4, max_new_tokens=1)
    assert speculated.tokens.shape == (3, 1)
    assert speculated.drafted.tolist() == [0, 0, 0]
    assert speculated.verifications.tolist() == [1, 1, 1]
    assert math.isnan(speculated.acceptance_rate)
    assert speculated.tokens_per_verification == 1


def test_all_end_tokens_of_a_list_end(decoder):
    model = copy.deepcopy(decoder.model)
    first = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [first, int(hugging_face(model, *prompts(7))[1, 1])]
    several = EarlyExitT5(model)
    speculated = several.speculate(
        *prompts(7), draft_layer=1, draft_length=3, max_new_tokens=LENGTH
    )
    assert speculated.tokens.equal(hugging_face(model, *prompts(7)))
    assert not speculated.tokens.equal(hugging_face(decoder.model, *prompts(7)))


@pytest.mark.parametrize("pad", [0, 1])
def test_generation_goes_on_after_a_start_token_that_is_also_an_end(tiny_t5, pad):
    model = copy.deepcopy(tiny_t5)
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.decoder_start_token_id, config.pad_token_id = 1, 1, pad
    decoder = EarlyExitT5(model)
    speculated = decoder.speculate(*prompts(3), draft_layer=2, max_new_tokens=LENGTH)
    assert speculated.tokens.shape[1] > 1
    assert speculated.tokens.equal(decoder.generate(*prompts(3), max_new_tokens=LENGTH).tokens)


# -- the work ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("sampling", [None, Sampling(seed=4)])
def test_counts_add_up(decoder, length, sampling):
    input_ids, mask = prompts(10)
    speculated = decoder.speculate(
        input_ids,
        mask,
        draft_layer=2,
        draft_length=length,
        sampling=sampling,
        max_new_tokens=LENGTH,
    )
    end = decoder.model.generation_config.eos_token_id
    lengths = [row.index(end) + 1 if end in row else LENGTH for row in speculated.tokens.tolist()]
    assert (speculated.accepted + speculated.verifications).tolist() == lengths
    assert (speculated.accepted <= speculated.drafted).all()
    most = speculation.LONGEST if length == "adaptive" else length
    assert (speculated.drafted <= most * speculated.verifications).all()
    assert speculated.acceptance_rate == speculated.accepted.sum() / speculated.drafted.sum()
    assert speculated.tokens_per_verification == pytest.approx(
        sum(lengths) / int(speculated.verifications.sum())
    )


@pytest.mark.parametrize("confidence", [None, 0.1])
def test_no_layer_is_run_twice_for_a_position_that_stays(decoder, confidence, monkeypatch):
    """m drafts and their verification run m E + L layers: what drafts computed is used again."""
    run = []
    for name in ("layer", "layer_exact"):
        original = getattr(decoder._backbone, name)

        def counting(index, state, cache, original=original):
            run.append(index)
            before = len(run)
            result = original(index, state, cache)
            del run[before:]  # one way may take the other
            return result

        monkeypatch.setattr(decoder._backbone, name, counting)
    speculated = decoder.speculate(
        *prompts(10),
        draft_layer=2,
        draft_length=3,
        draft_confidence=confidence,
        max_new_tokens=LENGTH,
    )
    assert (
        len(run) == 2 * speculated.drafted.sum() + decoder.n_layers * speculated.verifications.sum()
    )


def test_row_30_keys_and_values_after_cropping_are_those_of_a_full_run(tiny_t5, monkeypatch):
    decoder, (input_ids, _) = EarlyExitT5(weak_above(tiny_t5, 1, 0.15)), prompts(1)
    rejected, snapshots, original = [], [], speculation._verify

    def verified(backbone, cache, drafted, *others):
        first = cache.position - len(drafted)
        chosen = original(backbone, cache, drafted, *others)
        assert cache.position == first + len(chosen)
        assert {own.filled for own in cache.layers.values()} == {cache.position}
        rejected.append(len(chosen) <= len(drafted))
        kept = [(own.keys[:, :, : own.filled].clone(), own.values[:, :, : own.filled].clone())
                for _, own in sorted(cache.layers.items())]  # fmt: skip
        snapshots.append(kept)
        return chosen

    monkeypatch.setattr(speculation, "_verify", verified)
    tokens = (
        decoder.speculate(input_ids, draft_layer=1, draft_length=2, max_new_tokens=LENGTH)
        .tokens[0]
        .tolist()
    )
    assert set(rejected[:-1]) == {True, False}
    backbone = decoder._backbone
    with torch.inference_mode():
        full = backbone.start(input_ids, np.ones(input_ids.shape, dtype=bool), LENGTH)
        for token in [decoder.model.generation_config.decoder_start_token_id, *tokens[:-1]]:
            state = backbone.embed([token], full)
            for index in range(decoder.n_layers):
                state = backbone.layer(index, state, full)
            full.append(state)
    for kept in snapshots:
        assert len(kept) == decoder.n_layers
        for index, (keys, values) in enumerate(kept):
            filled = keys.shape[2]
            torch.testing.assert_close(
                keys, full.layers[index].keys[:, :, :filled], rtol=0, atol=1e-5
            )
            torch.testing.assert_close(
                values, full.layers[index].values[:, :, :filled], rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("sampling", [None, Sampling(seed=1)])
@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_drafts_of_layers_that_know_all_are_all_accepted(tiny_t5, length, sampling):
    same = EarlyExitT5(weak_above(tiny_t5, 2, 0.0))
    same._special = same._special._replace(ends=(-1,))
    speculated = same.speculate(
        *prompts(3), draft_layer=2, draft_length=length, sampling=sampling, max_new_tokens=LENGTH
    )
    assert speculated.acceptance_rate == 1
    assert (speculated.verifications == math.ceil(LENGTH / (length + 1))).all()


def test_a_draft_stops_where_it_is_unsure(tiny_t5, monkeypatch):
    decoder = EarlyExitT5(tiny_t5)
    decoder._special = decoder._special._replace(ends=(-1,))
    margins = spied(monkeypatch, "softmax_margin")
    speculated = decoder.speculate(
        *prompts(10), draft_layer=2, draft_length=3, draft_confidence=0.1, max_new_tokens=LENGTH
    )
    assert speculated.drafted.sum() == sum(margin[0] >= 0.1 for margin in margins)
    assert any(margin[0] < 0.1 for margin in margins)
    never = decoder.speculate(
        *prompts(10), draft_layer=2, draft_confidence=1.0, max_new_tokens=LENGTH
    )
    assert never.drafted.sum() == 0
    assert (never.verifications == LENGTH).all()


# -- adaptive drafts ---------------------------------------------------------------------------------------------------


@given(
    st.floats(0, 1),
    st.integers(2, 24).flatmap(lambda n: st.tuples(st.integers(1, n - 1), st.just(n))),
)
def test_the_best_draft_length_is_the_best_of_all(acceptance, layers):
    layer, n_layers = layers

    def rate(m):
        tokens = m + 1 if acceptance == 1 else (1 - acceptance ** (m + 1)) / (1 - acceptance)
        return tokens / (m * layer + n_layers)

    best = speculation.best_length(acceptance, layer, n_layers)
    assert rate(best) == pytest.approx(
        max(rate(m) for m in range(speculation.LONGEST + 1)), rel=1e-9
    )


def test_the_best_draft_length_at_the_ends():
    assert speculation.best_length(1.0, 1, 8) == speculation.LONGEST
    assert speculation.best_length(0.0, 1, 8) == 0
    lengths = [speculation.best_length(a, 2, 8) for a in np.linspace(0, 1, 101)]
    assert lengths == sorted(lengths)
    assert [a > 24 for a in range(101) if lengths[a] > 0] == [True] * 75, (
        "drafting one token pays where a L > E"
    )


def test_acceptance_is_estimated_from_what_was_judged(tiny_t5, monkeypatch):
    """Accepted tokens and the first rejected one of each draft; the others stood on a wrong premise."""
    decoder, rates = EarlyExitT5(weak_above(tiny_t5, 1, 0.15)), []
    drafts, chosen = spied(monkeypatch, "_draft"), spied(monkeypatch, "_verify")
    monkeypatch.setattr(speculation, "best_length", lambda rate, *_: rates.append(rate) or 3)
    decoder.speculate(*prompts(1), draft_layer=1, max_new_tokens=30)
    accepted = rejected = 0
    for rate, (drafted, _), tokens in zip(rates, drafts, chosen, strict=True):
        assert rate == (4 + accepted) / (5 + accepted + rejected)
        accepted += len(tokens) - 1
        rejected += len(tokens) <= len(drafted)
    assert min(accepted, rejected) > 0


def test_adaptive_drafts_grow_with_success_and_stop_with_failure(tiny_t5, monkeypatch):
    drafts = spied(monkeypatch, "_draft")
    good = EarlyExitT5(weak_above(tiny_t5, 1, 0.0))
    good._special = good._special._replace(ends=(-1,))
    good.speculate(*prompts(1), draft_layer=1, max_new_tokens=80)
    lengths = [len(drafted) for drafted, _ in drafts]
    assert lengths[:-1] == sorted(lengths[:-1])
    assert lengths[-2] > lengths[0] > 1
    drafts.clear()
    monkeypatch.setattr(speculation, "PRIOR", (0, 100))  # as if a hundred had been rejected
    speculated = good.speculate(*prompts(1), draft_layer=1, max_new_tokens=20)
    assert speculated.drafted.tolist() == [0]
    assert speculated.tokens.equal(good.generate(*prompts(1), max_new_tokens=20).tokens)


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sampling", [None, Sampling(seed=4)])
def test_a_row_of_a_batch_is_its_run_alone(decoder, side, sampling):
    input_ids, mask = prompts(7, side)
    settings = {"draft_layer": 2, "sampling": sampling, "max_new_tokens": LENGTH}
    together = decoder.speculate(input_ids, mask, **settings)
    for row, real in enumerate(mask.bool()):
        alone = decoder.speculate(input_ids[row : row + 1, real], **settings)
        length = alone.tokens.shape[1]
        assert together.tokens[row, :length].equal(alone.tokens[0])
        assert (together.tokens[row, length:] == decoder.model.generation_config.pad_token_id).all()
        for name in ("drafted", "accepted", "verifications"):
            assert getattr(together, name)[row] == getattr(alone, name)[0]


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(seed=0), Sampling(temperature=0.5, seed=1), Sampling(top_p=0.7, seed=2),
                                      Sampling(temperature=1.5, top_p=0.9, seed=3)], ids=repr)  # fmt: skip
def test_sampled_tokens_are_those_of_plain_sampling(decoder, sampling):
    input_ids, mask = prompts(5)
    plain = decoder.generate(
        input_ids, mask, policy=ExitPolicy(sampling=sampling), max_new_tokens=LENGTH
    ).tokens
    right = wrong = 0
    for layer in range(1, decoder.n_layers):
        for length in (1, 4, "adaptive"):
            speculated = decoder.speculate(
                input_ids,
                mask,
                draft_layer=layer,
                draft_length=length,
                sampling=sampling,
                max_new_tokens=LENGTH,
            )
            assert speculated.tokens.equal(plain)
            right += int(speculated.accepted.sum())
            wrong += int((speculated.drafted - speculated.accepted).sum())
    assert min(right, wrong) > 20


VOCABULARY, SEEDS, SAMPLING = 7, 1000, {"temperature": 0.8, "top_p": 0.9}


@pytest.fixture(scope="module")
def few_words():
    """Three layers and seven tokens, of which the last ends a text."""
    torch.manual_seed(5)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_heads=2,
        num_layers=1,
        num_decoder_layers=3,
        tie_word_embeddings=False,
        eos_token_id=VOCABULARY - 1,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 16) * 0.6)
    return model


@pytest.fixture(scope="module")
def speculated(few_words) -> list[Speculation]:
    """Two tokens for one prompt, at every seed, each time drafting the first."""
    decoder, prompt = EarlyExitT5(few_words), torch.tensor([[3, 1, 4]])
    return [
        decoder.speculate(
            prompt,
            draft_layer=1,
            draft_length=1,
            sampling=Sampling(seed=seed, **SAMPLING),
            max_new_tokens=2,
        )
        for seed in range(SEEDS)
    ]


@torch.inference_mode()
def next_token_law(model, said: list[int], layer: int | None = None) -> np.ndarray:
    """(V,) by Hugging Face's modules and numpy; of a draft layer, or of the full model."""
    output = model(
        input_ids=torch.tensor([[3, 1, 4]]),
        decoder_input_ids=torch.tensor([[0, *said]]),
        output_hidden_states=True,
    )
    logits = output.logits[0, -1]
    if layer is not None:
        logits = model.lm_head(
            model.decoder.final_layer_norm(output.decoder_hidden_states[layer][0, -1])
        )
    scaled = np.float64(logits) / SAMPLING["temperature"]
    law = np.exp(scaled - scaled.max())
    law /= law.sum()
    order = np.argsort(-law)
    taken = int(np.searchsorted(np.cumsum(law[order]), SAMPLING["top_p"])) + 1
    law[order[taken:]] = 0
    return law / law.sum()


def law_of_two(model, layer=None) -> np.ndarray:
    """(V, V): the first token and the one after it; nothing follows an end token, written as the padding id."""
    first = next_token_law(model, [], layer)
    after = np.array([next_token_law(model, [token], layer) for token in range(VOCABULARY)])
    after[-1] = np.eye(VOCABULARY)[0]
    return first[:, None] * after


def chi_square(counts: np.ndarray, law: np.ndarray) -> float:
    """Its p-value, cells in which fewer than five are expected taken together; 0 where something impossible was seen."""
    if counts[law == 0].any():
        return 0.0
    expected = law * counts.sum()
    cells = [(counts[expected >= 5], expected[expected >= 5])]
    if 0 < expected.min(initial=5, where=law > 0) < 5:
        cells.append(
            (counts[expected < 5].sum(keepdims=True), expected[expected < 5].sum(keepdims=True))
        )
    return float(stats.chisquare(*map(np.concatenate, zip(*cells, strict=True))).pvalue)


def test_row_30_the_law_of_sampled_tokens_is_the_full_models(few_words, speculated):
    pairs = torch.cat(
        [torch.nn.functional.pad(one.tokens, (0, 2 - one.tokens.shape[1])) for one in speculated]
    ).numpy()
    counts = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(counts, tuple(pairs.T), 1)
    full, draft = law_of_two(few_words), law_of_two(few_words, layer=1)
    assert (full == 0).any(), "nothing is cut off by top_p"
    assert chi_square(counts.sum(1), full.sum(1)) > 1e-3
    assert chi_square(counts, full) > 1e-3
    # what would be seen if every draft were accepted is told apart
    assert chi_square(counts.sum(1), draft.sum(1)) < 1e-9
    assert chi_square(counts, draft) < 1e-9


def test_acceptance_is_that_of_common_noise(few_words, speculated):
    """Below that of rejection sampling, 1 - TV(p, q), and at least (1 - TV) / (1 + TV)."""
    p, q = next_token_law(few_words, []), next_token_law(few_words, [], layer=1)
    both = (p > 0) & (q > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.fmax(p[None, :] / p[:, None], q[None, :] / q[:, None])
    agreeing = np.where(both, 1 / ratios.sum(1), 0)
    rate = agreeing[:-1].sum() / (1 - q[-1])  # a drafted end is left to the full model
    drafted = sum(int(one.drafted) for one in speculated)
    measured = sum(int(one.accepted) for one in speculated) / drafted
    assert abs(measured - rate) < 4 * math.sqrt(rate * (1 - rate) / drafted)
    distance = np.abs(p - q).sum() / 2
    assert (1 - distance) / (1 + distance) <= agreeing.sum() <= 1 - distance


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"draft_layer": 0}, "draft_layer: 0 is not a whole number"),
        ({"draft_layer": True}, "draft_layer: True"),
        ({"draft_layer": 9}, "draft_layer: 9, but the model has . layers"),
        ({"draft_length": 0}, "draft_length: 0"),
        (
            {"draft_length": "dynamic"},
            "draft_length: 'dynamic'; give a number of tokens, or 'adaptive'",
        ),
        ({"draft_confidence": 1.5}, "draft_confidence: 1.5 is no softmax margin"),
        ({"draft_confidence": math.nan}, "draft_confidence: is NaN"),
        ({"sampling": 0.7}, "sampling: 0.7 is no riskcal.Sampling"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"input_ids": [[]]}, "input_ids: has shape"),
        ({"attention_mask": [[1, 1]]}, "attention_mask: has shape"),
    ],
)
def test_bad_arguments(tiny_t5, settings, complaint):
    asked = {"input_ids": [[3, 4, 5]], "draft_layer": 1} | settings
    with pytest.raises(RiskcalError, match=complaint):
        EarlyExitT5(tiny_t5).speculate(asked.pop("input_ids"), **asked)
