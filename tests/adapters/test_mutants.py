"""Bugs of published early-exit code, each put into the decoder: the properties that the other tests check must fail.

A mutant that passes would mean that those tests could not have found the bug. The bugs are those of t5x (CALM), FREE, the
pruned-softmax and contrastive code, and of this decoder's own past.
"""

import copy
import math

import numpy as np
import pytest
import torch
from exit_reference import CLASSIFIER, assert_agrees, middling
from t5_reference import LENGTH, assert_row, prompts

from riskcal import Decaying, ExitPolicy
from riskcal.policy import Contrast, Sampling
from riskcal.pruning import Pruning
from riskcal_adapters import request_checks
from riskcal_adapters.torch import EarlyExitT5, measures, sampling, selfcheck
from riskcal_adapters.torch.backbone import Backbone
from riskcal_adapters.torch.confidence import Judge
from riskcal_adapters.torch.heads import PrunedHead
from riskcal_adapters.torch.loop import Loop
from riskcal_adapters.torch.scores import Scores
from riskcal_adapters.torch.t5_backbone import T5Backbone

DECAYS = Decaying(temperature=4.0, max_length=LENGTH)


# -- properties: each takes a model and raises AssertionError where it does not hold -------------------------------------------


def agrees(batch=3, length=6, **fields):
    """Decoding is the definition."""

    def check(model):
        policy = middling(model, **fields)
        assert (
            len(
                set(assert_agrees(model, policy, classifier=CLASSIFIER, batch=batch, length=length))
            )
            > 1
        )

    return check


def exact_threshold_exits(model):
    """A confidence of exactly the threshold exits."""
    decoder, (one, _) = EarlyExitT5(model), prompts(1)
    confidence = decoder.generate(
        one, policy=ExitPolicy.static(2), max_new_tokens=1
    ).confidence.item()
    policy = ExitPolicy(thresholds={2: confidence})
    assert decoder.generate(one, policy=policy, max_new_tokens=1).exit_layers.item() == 2


def decay_starts_at_position_0(model):
    """The first generated token needs 0.9 threshold + 0.1: here just more than it has."""
    decoder, (one, _) = EarlyExitT5(model), prompts(1)
    confidence = decoder.generate(
        one, policy=ExitPolicy.static(2), max_new_tokens=1
    ).confidence.item()
    policy = ExitPolicy(thresholds={2: (confidence + 1e-4 - 0.1) / 0.9}, schedule=DECAYS)
    assert (
        decoder.generate(one, policy=policy, max_new_tokens=1).exit_layers.item()
        == decoder.n_layers
    )


def nan_stays(model):
    """A NaN confidence never exits."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    generation = EarlyExitT5(broken).generate(
        *prompts(2), policy=ExitPolicy(threshold=0.1), max_new_tokens=2
    )
    assert (generation.exit_layers == broken.config.num_decoder_layers).all()


def rows_as_alone(**fields):
    """A row of a batch is its run alone."""

    def check(model):
        decoder = EarlyExitT5(model, classifier=CLASSIFIER)
        policies = [middling(model, **fields)] * 4
        if fields.get("cache") == "deferred":
            policies = [ExitPolicy(threshold=value, **fields) for value in (0.05, 0.2, 0.4, 0.6)]
        for side in ("left", "right"):
            input_ids, mask = prompts(4, side)
            together = decoder.generate(input_ids, mask, policy=policies, max_new_tokens=8)
            for row, real in enumerate(mask.bool()):
                alone = decoder.generate(
                    input_ids[row : row + 1, real], policy=policies[row], max_new_tokens=8
                )
                assert_row(together, row, alone)

    return check


def draws_from_the_nucleus(model):
    """Top-p includes the token that reaches p, and nothing after it."""
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    assert sampling.nucleus(logits, Sampling(top_p=0.6)).isfinite().tolist() == [True, True, False]


# -- mutants: each takes pytest's monkeypatch ------------------------------------------------------------------------------------


def cache_instead(mutant):
    def patch(monkeypatch):
        run = Loop.run

        def changed(self, policy, *given):
            return run(
                self,
                policy.model_copy(update={"cache": mutant} if not policy.is_full_model else {}),
                *given,
            )

        monkeypatch.setattr(Loop, "run", changed)

    return patch


def strict_comparison(monkeypatch):
    table = request_checks.exit_thresholds
    monkeypatch.setattr(
        request_checks,
        "exit_thresholds",
        lambda *given, **named: np.nextafter(table(*given, **named), np.float32(np.inf)),
    )


def whole_array_norm(monkeypatch):
    def cosine(state, before):
        if before is None:
            return torch.zeros(len(state))
        return (state * before).sum(-1) / (state.norm() * before.norm())

    monkeypatch.setattr(measures, "saturation", cosine)


def flattened_argmax_of_the_oracle(monkeypatch):
    of_scores = Judge._of_scores

    def flattened(self, layer, scores):
        if self._measure != "oracle":
            return of_scores(self, layer, scores)
        row = int(scores.logits.argmax()) // scores.logits.shape[1]
        agrees_ = scores.best()[row] == self._targets[row]
        return torch.full((len(scores.logits),), float(agrees_))

    monkeypatch.setattr(Judge, "_of_scores", flattened)


def nan_exits(monkeypatch):
    look = Judge.look

    def changed(self, *given):
        confidence, scores = look(self, *given)
        return np.where(np.isnan(confidence), np.float32(np.inf), confidence), scores

    monkeypatch.setattr(Judge, "look", changed)


def decay_index(change):
    def patch(monkeypatch):
        local = Decaying.local_threshold
        monkeypatch.setattr(
            Decaying,
            "local_threshold",
            lambda self, value, t: local(self, value, change(np.asarray(t))),
        )

    return patch


def kept_sorted_by_id(monkeypatch):
    scores = PrunedHead.scores

    def changed(self, layer, *given):
        found = scores(self, layer, *given)
        if layer == self._start:
            self._ids = self._ids.sort(-1).values
        return found

    monkeypatch.setattr(PrunedHead, "scores", changed)


def adaptive_without_effect(monkeypatch):
    kept = Pruning.kept
    monkeypatch.setattr(
        Pruning,
        "kept",
        lambda self, *a, **k: kept(Pruning("adaptive-code", self.largest, self.smallest), *a, **k),
    )


def scaled_wrongly(monkeypatch):
    """Tied: no d^-1/2. Untied: d^-1/2."""
    make = T5Backbone.__init__

    def changed(self, model, start):
        make(self, model, start)
        self._head = self._head * model.config.d_model ** (
            0.5 if model.config.scale_decoder_outputs else -0.5
        )

    monkeypatch.setattr(T5Backbone, "__init__", changed)


def no_norm(monkeypatch):
    monkeypatch.setattr(Backbone, "logits", lambda self, state: state @ self.head)


def repetition_penalty_on_what_is_emitted(monkeypatch):
    step, choose = Loop.step, Loop._choose

    def noting(self, run, previous, *given):
        run.said = [*getattr(run, "said", []), previous]
        return step(self, run, previous, *given)

    def penalised(self, run, scores, rows, places):
        logits = scores.logits.clone()
        for said in getattr(run, "said", []):
            for place, row in zip(places, rows, strict=True):
                value = logits[place, said[row]]
                logits[place, said[row]] = value / 1.2 if value > 0 else value * 1.2
        return choose(self, run, Scores(logits), rows, places)

    monkeypatch.setattr(Loop, "step", noting)
    monkeypatch.setattr(Loop, "_choose", penalised)


def head_off_by_one(monkeypatch):
    look = Judge.look
    monkeypatch.setattr(
        Judge,
        "look",
        lambda self, layer, state, before: look(
            self, layer, state if before is None else before, before
        ),
    )


def rows_that_left_go_on(monkeypatch):
    monkeypatch.setattr(Loop, "_column", lambda *given: None)


def exact_caches_project(monkeypatch):
    def changed(self, index, state, cache):
        return self.layer(index, state, cache)

    monkeypatch.setattr(Backbone, "layer_exact", changed)


def contrast_without_the_mass(monkeypatch):
    contrasted = measures.contrasted
    monkeypatch.setattr(
        measures, "contrasted", lambda *a, tail, mass: contrasted(*a, tail=tail, mass=False)
    )


def always_the_earliest_amateur(monkeypatch):
    distant = Judge._most_distant
    monkeypatch.setattr(
        Judge,
        "_most_distant",
        lambda self, layer, earlier, *given: distant(self, layer, earlier[:1], *given),
    )


def alpha_of_certainty(monkeypatch):
    """alpha' = alpha / (1 + r i) * c, which narrows the plausible tokens as the layer grows surer."""
    monkeypatch.setattr(
        measures,
        "alpha_at",
        lambda alpha, r, i, doubt: (alpha / (1 + r * i) * (1 - doubt))[:, None],
    )


def pending_never_counted(monkeypatch):
    monkeypatch.setattr(Loop, "_by_row", lambda self, run, needed: needed.T[:, None].copy())


def forced_rows_share_a_batch(monkeypatch):
    settings = request_checks._in_common
    monkeypatch.setattr(request_checks, "_in_common", lambda *given: (*settings(*given)[:2], False))


def noise_by_row(monkeypatch):
    monkeypatch.setattr(sampling, "noise_keys", lambda tokens, mask: list(range(len(tokens))))


def noise_of_the_padding(monkeypatch):
    keys = sampling.noise_keys
    monkeypatch.setattr(
        sampling, "noise_keys", lambda tokens, mask: keys(tokens, np.ones_like(mask))
    )


def nucleus_without_the_token_that_reaches_it(monkeypatch):
    def narrow(logits, sampling):
        log = torch.log_softmax(logits.double() / sampling.temperature, -1)
        ordered = log.sort(dim=-1, descending=True, stable=True)
        return log.index_fill(
            0, ordered.indices[ordered.values.exp().cumsum(-1) > sampling.top_p], -torch.inf
        )

    monkeypatch.setattr(sampling, "nucleus", narrow)


PRUNED = {
    form: agrees(pruning=Pruning(form, largest=24, smallest=4)) for form in ("decaying", "adaptive")
}
MUTANTS = {
    "t5x propagates the first exit's state": (cache_instead("first"), agrees()),
    "keys and values copied upwards": (cache_instead("copy"), agrees()),
    "projected where exact was asked": (exact_caches_project, agrees(cache="deferred")),
    "FREE exits above the threshold only": (strict_comparison, exact_threshold_exits),
    "t5x takes the cosine of the whole array": (whole_array_norm, agrees(measure="state")),
    "t5x compares flattened argmaxes": (
        flattened_argmax_of_the_oracle,
        agrees(measure="oracle", batch=4),
    ),
    "t5x exits at NaN": (nan_exits, nan_stays),
    "t5x never passes the position": (
        decay_index(np.zeros_like),
        agrees(length=8, schedule=DECAYS),
    ),
    "FREE counts positions from 1": (decay_index(lambda t: t + 1), decay_starts_at_position_0),
    "kept ids sorted by id": (kept_sorted_by_id, PRUNED["decaying"]),
    "adaptive pruning without effect": (adaptive_without_effect, PRUNED["adaptive"]),
    "head scaled by the wrong power of d": (scaled_wrongly, agrees()),
    "head without the final norm": (no_norm, agrees()),
    "repetition penalty on what is emitted": (
        repetition_penalty_on_what_is_emitted,
        agrees(length=8),
    ),
    "head one layer too early": (head_off_by_one, agrees()),
    "rows that left go on in the batch": (rows_that_left_go_on, rows_as_alone()),
    "JSD not scaled by the plausible mass": (contrast_without_the_mass, agrees(measure="jsd")),
    "always the earliest amateur": (always_the_earliest_amateur, agrees(measure="jsd")),
    "alpha narrows with certainty": (
        alpha_of_certainty,
        agrees(measure="weighted", contrast=Contrast(alpha=0.5, alpha_decay=0.3)),
    ),
    "full passes never forced": (pending_never_counted, agrees(cache="deferred", max_pending=1)),
    "forced rows prune from other rows' first layer": (
        forced_rows_share_a_batch,
        rows_as_alone(cache="deferred", max_pending=2, pruning=Pruning("fixed", 20, 3)),
    ),
    "noise by row": (noise_by_row, rows_as_alone(sampling=Sampling(temperature=2.0))),
    "noise of the padding": (
        noise_of_the_padding,
        rows_as_alone(sampling=Sampling(temperature=2.0)),
    ),
    "nucleus without the token that reaches it": (
        nucleus_without_the_token_that_reaches_it,
        draws_from_the_nucleus,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_property_holds_and_fails_for_the_mutant(ending, monkeypatch, name):
    mutant, check = MUTANTS[name]
    check(ending)
    mutant(monkeypatch)
    # decoders compare themselves with their model when they are made: the property has to notice without that
    monkeypatch.setattr(selfcheck, "refuse_attachments", lambda model, backbone: None)
    with pytest.raises(AssertionError):
        check(ending)
