"""Exit-aware training by low-rank adapters: the pass is the decoder's, adapters change nothing else, training goes on exactly."""

import math

import causal_models
import numpy as np
import pytest
import tiny_causal
import torch
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from riskcal import ExitPolicy, RiskcalError
from riskcal_adapters.torch import EarlyExitCausalLM, training
from riskcal_adapters.torch.exit_head_checks import backbone_fingerprint
from riskcal_adapters.torch.training import descent, divergence

FAMILY = [kind for kind in causal_models.KINDS if kind != "gpt2"]
LAYERS = 5


def model():
    """A random Llama whose exits are unlike its full path, though not strangers to it."""
    made = tiny_causal.llama(tied=False, hidden_size=32, intermediate_size=48)
    torch.manual_seed(0)
    for name, weight in made.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.1 if ".layers." in name else 0.5)
    return made


MODEL = model()
L = tiny_causal.LAYERS
EXITS = [1, 2, 3]
PROMPTS = [[5], [9, 33, 7], [21, 3, 4, 8, 11], [40, 41], [17], [50, 6, 12]]
OPTIONS = {"rank": 4, "steps": 20, "batch": 16, "learning_rate": 3e-3, "progress": False}


@pytest.fixture(scope="module")
def text():
    return training.self_generate(MODEL, PROMPTS, tokens=900, window=24, seed=1, batch=32)


@pytest.fixture(scope="module")
def held_out():
    begun = [[8], [10, 34], [22, 30, 41], [13, 55, 3, 4]]
    return training.self_generate(MODEL, begun, tokens=200, window=24, seed=2, batch=32)


@pytest.fixture(scope="module")
def tuned(text):
    return training.tune_exits(MODEL, text, EXITS, **OPTIONS)


def few(text, count=3):
    """The first sequences, as the pass reads them."""
    return divergence.padded(text, np.arange(count), torch.device("cpu"))


# -- the pass over known text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILY)
def test_without_exits_the_pass_is_the_models_own(kind):
    of = causal_models.model(kind)
    ids, mask = causal_models.prompts(4, side="right")
    may_exit = mask.bool()
    with torch.no_grad():
        whole = of(ids, output_hidden_states=True, use_cache=False)
        found = training.causal_pass(of, ids, may_exit, [2, 3])
        early = of.lm_head(of.model.norm(whole.hidden_states[3][may_exit]))
    assert list(found) == [2, 3, LAYERS]
    torch.testing.assert_close(found[LAYERS], whole.logits[may_exit], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[3], early, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FAMILY)
def test_along_what_a_decoder_generated_the_pass_has_its_exits_and_tokens(kind):
    of, decoder = causal_models.model(kind), causal_models.decoder(kind)
    ids, mask = causal_models.prompts(6)
    margins = decoder.trace(ids, mask, max_new_tokens=8).confidence[:, :-1]
    threshold = float(np.quantile(margins[np.isfinite(margins)], 0.9))
    seen, copied = set(), 0.0
    for row, real in zip(ids, mask.bool(), strict=True):
        prompt = row[real][None]
        policy = ExitPolicy(threshold=threshold, measure="softmax")
        made = decoder.generate(prompt, policy=policy, max_new_tokens=8)
        tokens = made.tokens[0]
        known = torch.cat([prompt[0], tokens[:-1]])[None]
        may_exit = torch.arange(known.shape[1])[None] >= prompt.shape[1] - 1
        with torch.no_grad():
            found = training.causal_pass(of, known, may_exit, range(1, LAYERS + 1), threshold)
            plain = training.causal_pass(of, known, may_exit, [])
        copied = max(copied, float((found[LAYERS] - plain[LAYERS]).abs().max()))
        for place, (token, exit_layer) in enumerate(
            zip(tokens.tolist(), made.exit_layers[0].tolist(), strict=True)
        ):
            over = [
                layer
                for layer, logits in found.items()
                if layer == LAYERS
                or training.softmax_margin([], [logits[place : place + 1]]) >= threshold
            ]
            assert over[0] == exit_layer
            assert found[exit_layer][place].argmax() == token
            seen.add(exit_layer)
    assert len(seen) > 2
    assert copied > 1e-3  # a pass that copies no state would be seen


def test_what_left_goes_on_as_if_it_had_not():
    ids = torch.tensor([[5, 9, 33, 7, 21]])
    may_exit = torch.tensor([[False, False, True, False, False]])
    with torch.no_grad():
        plain = training.causal_pass(MODEL, ids, may_exit, EXITS)
        left = training.causal_pass(MODEL, ids, may_exit, EXITS, threshold=0.0)
    for layer, logits in plain.items():
        torch.testing.assert_close(left[layer], logits)


def test_a_prompt_is_read_by_all_layers_and_padding_by_none():
    ids = torch.tensor([[5, 9, 33, 7], [8, 6, 0, 0]])
    may_exit = torch.tensor([[False, True, True, True], [True, True, False, False]])
    other = ids.clone()
    other[1, 2:] = 44
    with torch.no_grad():
        one = training.causal_pass(MODEL, ids, may_exit, EXITS, threshold=0.0)
        two = training.causal_pass(MODEL, other, may_exit, EXITS, threshold=0.0)
        alone = training.causal_pass(MODEL, ids[1:, :2], may_exit[1:, :2], EXITS, threshold=0.0)
    for layer, logits in one.items():
        assert torch.equal(logits, two[layer])
        torch.testing.assert_close(logits[3:], alone[layer])


def test_only_families_and_layers_that_are_known_are_taken(text):
    ids, may_exit = few(text)
    with pytest.raises(RiskcalError, match="GPT2LMHeadModel is not of the Llama family"):
        training.causal_pass(tiny_causal.gpt2(), ids, may_exit, [1])
    with pytest.raises(RiskcalError, match="numbered 1 to 4"):
        training.causal_pass(MODEL, ids, may_exit, [5])


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_fresh_adapters_change_nothing_and_merged_ones_what_applied_ones_do(text, tuned):
    ids, _ = few(text)
    fresh = training.LowRankAdapters.fresh(MODEL, 4)
    assert backbone_fingerprint(fresh.merged(MODEL)) == backbone_fingerprint(MODEL)
    assert sorted(tuned.up) == sorted(
        name for name, part in MODEL.model.named_modules(prefix="model") if hasattr(part, "weight")
        and part.weight.ndim == 2 and "embed" not in name
    )  # fmt: skip
    with torch.no_grad():
        plain = MODEL(ids).logits
        with tuned.applied(MODEL):
            applied = MODEL(ids).logits
        merged = tuned.merged(MODEL)(ids).logits
        again = MODEL(ids).logits
    torch.testing.assert_close(merged, applied, rtol=1e-4, atol=1e-4)
    assert (applied - plain).abs().max() > 0.01
    assert torch.equal(again, plain)


def test_gradients_reach_adapters_alone(text):
    ids, may_exit = few(text)
    fresh = training.LowRankAdapters.fresh(MODEL, 4)
    learning = training.LowRankAdapters(
        {name: torch.nn.Parameter(part) for name, part in fresh.down.items()},
        {name: torch.nn.Parameter(part + 0.01) for name, part in fresh.up.items()},
        fresh.backbone,
    )
    found = divergence.exit_divergence(MODEL, ids, may_exit, EXITS, learning, 0.5)
    sum(found.values()).backward()
    assert all(part.grad is None for part in MODEL.parameters())
    assert all(part.requires_grad for part in MODEL.parameters())
    assert all(part.grad.any() for _, part in learning.named())


def test_adapters_are_read_as_they_were_written_and_for_their_model_alone(tuned, tmp_path):
    training.save_adapters(tuned, tmp_path / "adapters")
    assert sorted(file.name for file in (tmp_path / "adapters").iterdir()) == [
        "adapters.json",
        "adapters.safetensors",
    ]
    found = training.load_adapters(tmp_path / "adapters")
    assert (found.steps, found.backbone) == (20, backbone_fingerprint(MODEL))
    written = dict(tuned.named())
    assert {name: part.tolist() for name, part in found.named()} == {
        name: part.tolist() for name, part in written.items()
    }
    assert found.fingerprint == tuned.fingerprint
    with pytest.raises(RiskcalError, match="are for a model with weights"):
        found.merged(tuned.merged(MODEL))
    with pytest.raises(RiskcalError, match="nowhere: cannot be read"):
        training.load_adapters(tmp_path / "nowhere")
    other = training.LowRankAdapters.fresh(MODEL, 4, seed=1)
    training.save_adapters(other, tmp_path / "other")
    (tmp_path / "other" / "adapters.safetensors").replace(
        tmp_path / "adapters" / "adapters.safetensors"
    )
    with pytest.raises(RiskcalError, match="are not those that were written"):
        training.load_adapters(tmp_path / "adapters")
    with pytest.raises(RiskcalError, match="has one of its two factors only"):
        training.LowRankAdapters({"a": torch.ones(2, 3)}, {}, "")
    with pytest.raises(RiskcalError, match=r"factors \(4, 3\) and \(2, 3\)"):
        training.LowRankAdapters({"a": torch.ones(2, 3)}, {"a": torch.ones(4, 3)}, "")


# -- training ----------------------------------------------------------------------------------------------------------


def test_the_divergence_is_its_formula(text, tuned):
    ids, may_exit = few(text)
    with torch.no_grad():
        found = divergence.exit_divergence(MODEL, ids, may_exit, EXITS, tuned, math.inf)
        own = MODEL(ids).logits[may_exit].double().log_softmax(-1)
        merged = tuned.merged(MODEL)
        for layer, value in found.items():
            hidden = merged(ids, output_hidden_states=True).hidden_states[layer][may_exit]
            hidden = hidden if layer == L else merged.model.norm(hidden)  # the last comes normed
            said = merged.lm_head(hidden).double().log_softmax(-1)
            wanted = (own.exp() * (own - said)).sum(-1).mean()
            assert value.item() == pytest.approx(wanted.item(), rel=1e-3, abs=1e-5)


def test_exits_come_nearer_to_the_full_model_which_stays_as_it_was(held_out, tuned):
    before = training.exit_quality(MODEL, held_out, EXITS)
    after = training.exit_quality(MODEL, held_out, EXITS, tuned)
    assert before[L] == training.ExitQuality(1.0, 0.0)
    for layer in EXITS:
        assert after[layer].divergence < before[layer].divergence - 0.02
    assert after[L].agreement > 0.85
    assert after[L].divergence < 0.05


def test_quality_is_counted_over_all_positions_of_generated_tokens(held_out, tuned):
    found = training.exit_quality(MODEL, held_out, [2], tuned, batch=3)
    merged, agreed = tuned.merged(MODEL), []
    for ids, start in zip(held_out.ids, held_out.starts, strict=True):
        given = torch.from_numpy(ids[:-1])[None]
        with torch.no_grad():
            own = MODEL(given).logits[0, start - 1 :].argmax(-1)
            agreed += (merged(given).logits[0, start - 1 :].argmax(-1) == own).tolist()
    assert len(agreed) == held_out.generated
    assert found[L].agreement == pytest.approx(np.mean(agreed), abs=2 / len(agreed))


def test_more_weight_on_the_full_path_keeps_more_of_it(text, held_out):
    kept = []
    for keep in (0.05, 0.95):
        made = training.tune_exits(MODEL, text, EXITS, keep=keep, **OPTIONS | {"steps": 12})
        kept.append(training.exit_quality(MODEL, held_out, EXITS, made))
    assert kept[1][L].divergence < kept[0][L].divergence
    assert kept[1][3].divergence > kept[0][3].divergence


def test_the_model_is_left_as_it_was(text):
    before = {name: part.clone() for name, part in MODEL.state_dict().items()}
    training.tune_exits(MODEL, text, EXITS, **OPTIONS | {"steps": 2})
    assert all(torch.equal(part, before[name]) for name, part in MODEL.state_dict().items())
    assert not any(module._forward_hooks for module in MODEL.modules())
    assert all(part.requires_grad and part.grad is None for part in MODEL.parameters())


def test_the_tuned_model_decodes_with_exits_and_heads_of_its_own(text, tuned, tmp_path):
    merged = tuned.merged(MODEL)
    heads = training.train_heads(merged, text, [2], vocabulary=20, steps=5, progress=False)
    decoder = EarlyExitCausalLM(merged, heads=heads)
    ids = torch.tensor([[5, 9, 33]])
    full = decoder.generate(ids, policy=ExitPolicy.full_model(), max_new_tokens=8).tokens
    own = merged.generate(ids, do_sample=False, max_new_tokens=8)[:, 3:]
    assert full.tolist() == own.tolist()
    policy = ExitPolicy(thresholds={2: 0.0}, measure="softmax")
    assert decoder.generate(ids, policy=policy, max_new_tokens=4).exit_layers[0, 0] == 2
    with pytest.raises(RiskcalError, match="was trained for a model with weights"):
        EarlyExitCausalLM(MODEL, heads=heads)
    merged.save_pretrained(tmp_path)  # as a checkpoint of its own, whose heads these still are
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert EarlyExitCausalLM(again, heads=heads).weights == decoder.weights


def test_training_that_was_cut_off_goes_on_to_the_same_adapters(text, tmp_path, monkeypatch):
    options = OPTIONS | {"steps": 12, "save_steps": 5}
    whole = training.tune_exits(MODEL, text, EXITS, **options)
    step, made = descent.Descent.step, []

    def cut_off(self, loss, number):
        if number == 8:
            raise KeyboardInterrupt
        made.append(number)
        step(self, loss, number)

    with monkeypatch.context() as patched:
        patched.setattr(descent.Descent, "step", cut_off)
        with pytest.raises(KeyboardInterrupt):
            training.tune_exits(MODEL, text, EXITS, folder=tmp_path / "run", **options)
    reached = []
    for _ in range(2):  # goes on from step 5; and a finished folder as it is
        found = training.tune_exits(
            MODEL, text, EXITS, folder=tmp_path / "run", told=reached.append, **options
        )
        assert found.fingerprint == whole.fingerprint
        assert found.steps == 12
    assert made == list(range(8))
    assert [now.step for now in reached] == [10, 12]
    assert sorted(reached[0].divergence) == [*EXITS, L]
    for changed in ({"keep": 0.4}, {"seed": 1}, {"steps": 13}, {"thresholds": [0.5]}, {"rank": 2}):
        with pytest.raises(RiskcalError, match=r"in the training that .* holds"):
            training.tune_exits(MODEL, text, EXITS, folder=tmp_path / "run", **options | changed)
    with pytest.raises(RiskcalError, match=r"in the training that .* holds"):
        training.tune_exits(MODEL, text.split(0.5)[0], EXITS, folder=tmp_path / "run", **options)


def test_training_that_ran_out_of_time_goes_on_to_the_same_adapters(text, tmp_path):
    options = OPTIONS | {"steps": 4, "folder": tmp_path / "run"}
    steps = []
    while not steps or steps[-1] < 4:
        found = training.tune_exits(MODEL, text, EXITS, seconds=0.0, **options)
        steps.append(found.steps)
    assert steps == [1, 2, 3, 4]
    whole = training.tune_exits(MODEL, text, EXITS, **OPTIONS | {"steps": 4})
    assert found.fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ([], {}, r"layers: \[\]; give at least one from 1 to 3"),
        ([2, L], {}, "the last layer, 4, is always kept to"),
        ([0], {}, "numbered 1 to 4"),
        ([2], {"keep": 1.0}, "keep"),
        ([2], {"rank": 0}, "rank"),
        ([2], {"steps": 0}, "steps"),
        ([2], {"learning_rate": 0.0}, "learning_rate: 0"),
        ([2], {"thresholds": []}, "thresholds"),
        ([2], {"thresholds": [math.nan]}, "thresholds"),
        ([2], {"learning_rate": 1e30}, "by step 20 the loss is no longer finite"),
    ],
)
def test_what_cannot_be_trained_is_refused(text, layers, options, message):
    with pytest.raises(RiskcalError, match=message):
        training.tune_exits(MODEL, text, layers, **OPTIONS | options)


def test_models_that_the_pass_is_not_right_for_are_refused(text):
    with pytest.raises(RiskcalError, match="is in bfloat16; give it in float32"):
        training.tune_exits(model().to(torch.bfloat16), text, EXITS, **OPTIONS)
    config = MistralConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    torch.manual_seed(1)
    windowed = MistralForCausalLM(config).eval()
    for part in windowed.parameters():
        if part.ndim == 2:
            torch.nn.init.normal_(part, std=0.3)
    with pytest.raises(RiskcalError, match="windows that are shorter than the text"):
        training.tune_exits(windowed, text, EXITS, **OPTIONS)
