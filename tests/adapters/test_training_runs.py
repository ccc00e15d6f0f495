"""Training runs through Hugging Face's trainer: batches, what a stage draws, going on where a run was cut off, checkpoints."""

import copy
import math

import numpy as np
import torch
from transformers import TrainerCallback

from riskcal import ExitPolicy
from riskcal_adapters.decoding_study import decode_policies, static_and_adaptive
from riskcal_adapters.g2p.evaluate import errors, evaluate
from riskcal_adapters.numbers import data
from riskcal_adapters.torch import EarlyExitT5, load_example, load_t5
from riskcal_adapters.torch.training import dropout_rates
from riskcal_adapters.torch.training import trainer as trainers
from riskcal_adapters.torch.training.trainer import Batches, Stage, collate, new_t5, train, write_checkpoint


def some_pairs(count=40):
    rng = np.random.default_rng(0)
    return [(rng.integers(2, 41, 5).tolist(), rng.integers(2, 41, rng.integers(2, 7)).tolist()) for _ in range(count)]


def test_batches_hold_every_example_once_and_little_padding():
    lengths = np.random.default_rng(1).integers(1, 30, 103)
    batches = list(Batches(lengths, 8, seed=0))
    assert sorted(i for batch in batches for i in batch) == list(range(103))
    assert len(batches) == len(Batches(lengths, 8, seed=0)) == math.ceil(103 / 8)
    padding = sum(max(lengths[batch]) * len(batch) - sum(lengths[batch]) for batch in batches)
    assert padding < 0.1 * lengths.sum()
    assert list(Batches(lengths, 8, seed=1)) != batches == list(Batches(lengths, 8, seed=0))


def test_collate_shifts_targets_and_marks_padding():
    batch = collate([([5, 6, 1], [7, 8, 1]), ([9, 1], [3, 1])])
    assert batch["input_ids"].tolist() == [[5, 6, 1], [9, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["decoder_input_ids"].tolist() == [[0, 7, 8], [0, 3, 1]]
    assert batch["labels"].tolist() == [[7, 8, 1], [3, 1, -100]]


class StopAt(TrainerCallback):
    """Ends a run early, as a machine that goes down would, right after a save."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(tiny_t5, tmp_path):
    stage = Stage(steps=4, learning_rate=1e-3, batch_size=8, thresholds=(0.05, math.inf), largest_dropout=0.5)
    whole, cut, other = (copy.deepcopy(tiny_t5) for _ in range(3))
    train(whole, some_pairs(), tmp_path / "whole", stage, save_steps=2)
    train(cut, some_pairs(), tmp_path / "cut", stage, save_steps=2, callbacks=[StopAt(2)])
    assert any((a != b).any() for a, b in zip(cut.parameters(), whole.parameters(), strict=True))
    train(other, some_pairs(), tmp_path / "cut", stage, save_steps=2)
    for mine, wanted in zip(other.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-6)


def test_a_stage_draws_its_thresholds_and_dropped_layers(tiny_t5, tmp_path, monkeypatch):
    seen = []

    def spy(model, input_ids, attention_mask, decoder_input_ids, threshold, *, confidence, dropped):
        seen.append((threshold, dropped))
        return real(
            model, input_ids, attention_mask, decoder_input_ids, threshold, confidence=confidence, dropped=dropped
        )

    real = trainers.decoder_pass
    monkeypatch.setattr(trainers, "decoder_pass", spy)
    stage = Stage(steps=12, learning_rate=1e-4, batch_size=8, thresholds=(0.1, 0.5, math.inf), largest_dropout=0.9)
    train(copy.deepcopy(tiny_t5), some_pairs(), tmp_path, stage, save_steps=100)
    assert {threshold for threshold, _ in seen} == {0.1, 0.5, math.inf}
    dropped = torch.cat([rows for _, rows in seen], 1).double().mean(1)
    rates = dropout_rates(tiny_t5.config.num_decoder_layers, 0.9)
    assert dropped[0] == 0
    # 96 draws for each layer: five standard errors
    assert ((dropped - rates).abs() <= 5 * (rates * (1 - rates) / 96).sqrt() + 1e-12).all()


def test_a_written_checkpoint_decodes_alike(tmp_path):
    tokenizer = data.tokenizer()
    model = new_t5(len(tokenizer), decoder_layers=3)
    write_checkpoint(model.half().float(), tokenizer, tmp_path / "made")
    before, after = EarlyExitT5(model.eval(), tokenizer), EarlyExitT5(load_t5(tmp_path / "made"), tokenizer)
    encoded = before.encode(["en:12", "fr:3456"])
    for policy in (ExitPolicy.full_model(), ExitPolicy(threshold=0.2)):
        mine, wanted = (d.generate(*encoded, policy=policy, max_new_tokens=8) for d in (after, before))
        assert (mine.tokens == wanted.tokens).all()
        assert (mine.exit_layers == wanted.exit_layers).all()


def test_decoding_study_rows(tmp_path):
    decoder = load_example("g2p")
    words = ["phoneme", "calibration", "exit"]
    policies = {
        name: p for name, p in static_and_adaptive(8).items() if name in ("full model", "static 3", "threshold 0.5")
    }
    outputs = decoder.decode(decoder.generate(*decoder.encode(words), max_new_tokens=24).tokens)
    table = decode_policies(
        decoder, words, policies, lambda said: {"same": float(said == outputs)}, 24, split=str.split, batch_size=2
    )
    assert table["policy"].tolist() == list(policies)
    assert table["same"].iloc[0] == 1
    assert table["distance"].iloc[0] == 0
    assert table["layers"].iloc[:2].tolist() == [8, 3]
    assert 1 <= table["layers"].iloc[2] < 8
    assert len(static_and_adaptive(8)) == 1 + 7 + 9
    split = type("Split", (), {"words": words, "pronunciations": [[said] for said in outputs]})
    assert evaluate(decoder, split, {"full model": ExitPolicy.full_model()})["phoneme_error"].item() == 0


def test_phoneme_errors_take_the_pronunciation_that_suits_best():
    assert errors(["A B C", "D"], [["X Y Z", "A B"], ["E"]]) == {"phoneme_error": 2 / 3, "word_accuracy": 0.0}
    assert errors(["A B"], [["X", "A B"]]) == {"phoneme_error": 0.0, "word_accuracy": 1.0}
