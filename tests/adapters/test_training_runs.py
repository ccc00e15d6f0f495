"""Training runs through Hugging Face's trainer: batches, what a stage draws, going on where a run was cut off, checkpoints."""

import copy
import dataclasses
import errno
import functools
import json
import math
import os
import shutil
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from recipes.decoding_study import decode_policies, static_and_adaptive
from recipes.g2p.evaluate import errors, evaluate
from recipes.numbers import data
from riskcal import ExitPolicy, RiskcalError
from riskcal_adapters.torch import EarlyExitT5, load_example, load_t5, replacing
from riskcal_adapters.torch.training import (
    ExitClassifier,
    dropout_rates,
    folders,
    save_classifier,
    saved,
)
from riskcal_adapters.torch.training import trainer as trainers
from riskcal_adapters.torch.training.batches import Batches, collate, collator
from riskcal_adapters.torch.training.trainer import (
    Stage,
    new_t5,
    train,
    train_classifier,
    write_checkpoint,
)


def some_pairs(count=40):
    rng = np.random.default_rng(0)
    return [
        (rng.integers(2, 41, 5).tolist(), rng.integers(2, 41, rng.integers(2, 7)).tolist())
        for _ in range(count)
    ]


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


def test_batches_have_the_start_and_padding_of_the_model_and_mask_no_real_token(tiny_t5):
    model = copy.deepcopy(tiny_t5)
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 40, 7
    batch = collator(model)([([5, 0, 7, 1], [7, 8, 1]), ([9, 1], [0, 1])])
    assert batch["input_ids"].tolist() == [[5, 0, 7, 1], [9, 1, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["decoder_input_ids"].tolist() == [[40, 7, 8], [40, 0, 1]]
    assert batch["labels"].tolist() == [[7, 8, 1], [0, 1, -100]]


@pytest.mark.parametrize("kind", ["backbone", "classifier"])
def test_training_begins_where_decoding_does(tiny_t5, tmp_path, monkeypatch, kind):
    model, seen = copy.deepcopy(tiny_t5), []
    model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = 40

    def spy(model, input_ids, attention_mask, decoder_input_ids, *settings, **more):
        seen.append(decoder_input_ids[:, 0].unique().tolist())
        return real(model, input_ids, attention_mask, decoder_input_ids, *settings, **more)

    real = trainers.decoder_pass
    monkeypatch.setattr(trainers, "decoder_pass", spy)
    if kind == "backbone":
        train(
            model, some_pairs(), tmp_path / "run", Stage(steps=2, learning_rate=1e-3, batch_size=8)
        )
    else:
        train_classifier(model, some_pairs(), tmp_path / "run", steps=2, batch_size=8)
    assert seen == [[40], [40]]


def test_what_was_trained_from_a_start_token_is_decoded_from_it(tmp_path):
    """Five answers learnt by heart: exact where decoding begins as training did, and only there."""
    model = new_t5(41, decoder_layers=2)
    model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = 40
    pairs = [([token, 1], [token + 10, token + 20, 1]) for token in range(2, 7)]
    train(
        model,
        pairs,
        tmp_path / "run",
        Stage(steps=60, learning_rate=3e-3, batch_size=5),
        save_steps=60,
    )
    prompts = torch.tensor([source for source, _ in pairs])

    def exact(start):
        model.generation_config.decoder_start_token_id = start
        said = (
            EarlyExitT5(model.eval())
            .generate(prompts, torch.ones_like(prompts), max_new_tokens=3)
            .tokens
        )
        return (said == torch.tensor([target for _, target in pairs])).all(1).double().mean()

    assert exact(40) == 1
    assert exact(0) < 1


def test_a_written_checkpoint_keeps_the_ids_of_generation(tmp_path):
    model = new_t5(101, decoder_layers=2)
    model.generation_config.decoder_start_token_id = 41  # the config still says 0
    write_checkpoint(model, data.tokenizer(), tmp_path / "made")
    kept = json.loads((tmp_path / "made" / "generation_config.json").read_text())
    assert kept["decoder_start_token_id"] == 41


class StopAt(TrainerCallback):
    """Ends a run early, as a machine that goes down would, right after a save."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(tiny_t5, tmp_path):
    stage = Stage(
        steps=4, learning_rate=1e-3, batch_size=8, thresholds=(0.05, math.inf), largest_dropout=0.5
    )
    whole, cut, other = (copy.deepcopy(tiny_t5) for _ in range(3))
    train(whole, some_pairs(), tmp_path / "whole", stage, save_steps=2)
    train(cut, some_pairs(), tmp_path / "cut", stage, save_steps=2, callbacks=[StopAt(2)])
    assert any((a != b).any() for a, b in zip(cut.parameters(), whole.parameters(), strict=True))
    train(other, some_pairs(), tmp_path / "cut", stage, save_steps=2)
    for mine, wanted in zip(other.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-6)


STAGE = Stage(steps=5, learning_rate=1e-3, batch_size=8)


class Steps(TrainerCallback):
    """Which steps were made."""

    def __init__(self) -> None:
        self.made = []

    def on_step_end(self, args, state, control, **kwargs):
        self.made.append(state.global_step)


def equal(model, other):
    return all(
        bool((a == b).all()) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("save_steps", [1, 2, 5, 500])
def test_a_finished_folder_gives_its_weights_and_makes_no_step(tiny_t5, tmp_path, save_steps):
    first, second, steps = copy.deepcopy(tiny_t5), copy.deepcopy(tiny_t5), Steps()
    settings = {"save_steps": save_steps, "callbacks": [steps]}
    train(first, some_pairs(), tmp_path, STAGE, **settings)
    assert steps.made == [1, 2, 3, 4, 5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(second, some_pairs(), tmp_path, STAGE, **settings)
        train(first, some_pairs(), tmp_path, STAGE, **settings)
    assert steps.made == [1, 2, 3, 4, 5]
    assert equal(second, first)
    assert not equal(second, tiny_t5)


@pytest.fixture(scope="module")
def begun(tiny_t5, tmp_path_factory):
    """A folder of a run that was finished, or cut off; to be copied."""

    @functools.cache
    def folder(finished):
        made = tmp_path_factory.mktemp("begun")
        stops = [] if finished else [StopAt(2)]
        train(copy.deepcopy(tiny_t5), some_pairs(), made, STAGE, save_steps=2, callbacks=stops)
        return made

    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 6}, r"stage\.steps: 5 in the training that .* holds, 6 now.*another folder"),
        ({"learning_rate": 2e-3}, r"stage\.learning_rate: 0.001"),
        ({"thresholds": (0.5, math.inf)}, r"stage\.thresholds: \[Infinity\]"),
        ({"confidence": trainers.ExitClassifier}, r"stage\.confidence: \"softmax_margin\""),
        ({"weights": "uniform"}, r"stage\.weights"),
        ({"seed": 1}, r"stage\.seed: 0"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_stage_is_refused(tiny_t5, begun, tmp_path, change, message, finished):
    folder = shutil.copytree(begun(finished), tmp_path / "run")
    model = copy.deepcopy(tiny_t5)
    with pytest.raises(RiskcalError, match=message):
        train(model, some_pairs(), folder, dataclasses.replace(STAGE, **change))
    assert equal(model, tiny_t5)
    if finished:  # the remedy has nothing to do with the folder that was refused
        other = dataclasses.replace(STAGE, **change | {"confidence": STAGE.confidence})
        train(model, some_pairs(), tmp_path / "another", other)
        assert not equal(model, tiny_t5)


def test_a_folder_of_other_pairs_or_another_model_is_refused_and_other_weights_are_said(
    tiny_t5, tmp_path
):
    train(copy.deepcopy(tiny_t5), some_pairs(), tmp_path, STAGE)
    with pytest.raises(RiskcalError, match="pairs: others in the training"):
        train(copy.deepcopy(tiny_t5), some_pairs(41), tmp_path, STAGE)
    with pytest.raises(RiskcalError, match="model: another shape in the training"):
        train(new_t5(41, decoder_layers=2), some_pairs(), tmp_path, STAGE)
    other = copy.deepcopy(tiny_t5)
    with torch.no_grad():
        other.shared.weight += 1
    with pytest.warns(
        UserWarning, match="began with other weights .* now replaced by its own at checkpoint-5"
    ) as caught:
        train(other, some_pairs(), tmp_path, STAGE)
    assert caught[0].filename == __file__
    (tmp_path / folders.SETTINGS_FILE).unlink()
    with pytest.raises(RiskcalError, match=r"holds checkpoints, but no stage\.json"):
        train(copy.deepcopy(tiny_t5), some_pairs(), tmp_path, STAGE)


def test_a_recipe_s_folder_begun_with_other_options_is_refused(tmp_path):
    folders.note_settings(tmp_path / "new" / "run", {"scale": 0.1, "seed": 0}, file="recipe.json")
    folders.note_settings(tmp_path / "new" / "run", {"scale": 0.1, "seed": 0}, file="recipe.json")
    with pytest.raises(RiskcalError, match=r"scale: 0\.1 in the training that .* holds, 1\.0 now"):
        folders.note_settings(
            tmp_path / "new" / "run", {"scale": 1.0, "seed": 0}, file="recipe.json"
        )


@pytest.mark.parametrize("recipe", ["g2p", "numbers"])
def test_recipes_do_not_take_another_scale_s_checkpoint_for_their_own(
    tmp_path, monkeypatch, recipe
):
    module = pytest.importorskip(f"recipes.{recipe}.train")
    folders.note_settings(
        tmp_path, {"seed": 0, "scale": 0.1, "decoder_layers": 8}, file="recipe.json"
    )
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(tmp_path)])
    with pytest.raises(RiskcalError, match=r"scale: 0\.1 in the training"):
        module.main()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "pairs: there is none"),
        (
            [([2, 1], [3, 1]), ([2, 1], [41, 1])],
            "pairs: the target at row 1 holds 41, not in the model's vocabulary of 41",
        ),
        ([([-1, 1], [3, 1])], "pairs: the prompt at row 0 holds -1"),
        ([([2, 1], [])], "pairs: the target at row 0 is empty"),
    ],
)
def test_bad_pairs(tiny_t5, tmp_path, pairs, message):
    for begin in (
        lambda: train(tiny_t5, pairs, tmp_path / "run", STAGE),
        lambda: train_classifier(tiny_t5, pairs, tmp_path),
    ):
        with pytest.raises(RiskcalError, match=message):
            begin()
    assert not (tmp_path / "run").exists()


def refused_by_the_system(*arguments, **settings):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/somewhere")


def test_what_cannot_be_written_is_said_with_its_path(tiny_t5, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(
            RiskcalError,
            match=r"file.*: cannot be written \((File exists|Not a directory)\); make room",
        ):
            train(tiny_t5, some_pairs(), folder, STAGE)
    with monkeypatch.context() as patch:
        patch.setattr(trainers.PairTrainer, "_save_checkpoint", refused_by_the_system)
        with pytest.raises(
            RiskcalError,
            match=r"/somewhere: cannot be written \(Read-only file system\); make room",
        ):
            train(copy.deepcopy(tiny_t5), some_pairs(), tmp_path / "run", STAGE)
    with monkeypatch.context() as patch:
        patch.setattr(saved, "save_file", refused_by_the_system)
        with pytest.raises(RiskcalError, match="Read-only file system"):
            write_checkpoint(new_t5(101, decoder_layers=1), data.tokenizer(), tmp_path / "made")
    with pytest.raises(RiskcalError, match=r"c\.safetensors: cannot be written"):
        save_classifier(ExitClassifier(4), tmp_path / "absent" / "c.safetensors")
    # there is room now: the same call goes on
    train(copy.deepcopy(tiny_t5), some_pairs(), tmp_path / "run", STAGE)


def test_a_folder_is_one_writers_work_and_whole(tmp_path):
    """Two writers of one checkpoint, be they threads or containers whose processes have one id, never share a folder."""
    wrong = []

    def write(who):
        for _ in range(20):
            try:
                with replacing.replaced(tmp_path / "made") as staging:
                    for file in ("config", "weights"):
                        (staging / file).write_text(who)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=write, args=(who,)) for who in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    made = {path.name: path.read_text() for path in (tmp_path / "made").iterdir()}
    assert made in ({"config": "a", "weights": "a"}, {"config": "b", "weights": "b"})


def test_a_folder_that_cannot_be_finished_leaves_the_old_one_and_nothing_else(tmp_path):
    with replacing.replaced(tmp_path / "made") as staging:
        (staging / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), replacing.replaced(tmp_path / "made") as staging:
        (staging / "file").write_text(f"half {1 / 0}")
    assert [(path.name, (path / "file").read_text()) for path in tmp_path.iterdir()] == [
        ("made", "old")
    ]
    (tmp_path / "mine").write_text("a file")
    with (
        pytest.raises(RiskcalError, match="mine: cannot be written"),
        replacing.replaced(tmp_path / "mine"),
    ):
        pass
    assert (tmp_path / "mine").read_text() == "a file"


def test_a_stage_draws_its_thresholds_and_dropped_layers(tiny_t5, tmp_path, monkeypatch):
    seen = []

    def spy(model, input_ids, attention_mask, decoder_input_ids, threshold, *, confidence, dropped):
        seen.append((threshold, dropped))
        return real(
            model,
            input_ids,
            attention_mask,
            decoder_input_ids,
            threshold,
            confidence=confidence,
            dropped=dropped,
        )

    real = trainers.decoder_pass
    monkeypatch.setattr(trainers, "decoder_pass", spy)
    stage = Stage(
        steps=12,
        learning_rate=1e-4,
        batch_size=8,
        thresholds=(0.1, 0.5, math.inf),
        largest_dropout=0.9,
    )
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
    before, after = (
        EarlyExitT5(model.eval(), tokenizer),
        EarlyExitT5(load_t5(tmp_path / "made"), tokenizer),
    )
    encoded = before.encode(["en:12", "fr:3456"])
    for policy in (ExitPolicy.full_model(), ExitPolicy(threshold=0.2)):
        mine, wanted = (
            d.generate(*encoded, policy=policy, max_new_tokens=8) for d in (after, before)
        )
        assert (mine.tokens == wanted.tokens).all()
        assert (mine.exit_layers == wanted.exit_layers).all()


def test_decoding_study_rows(tmp_path):
    decoder = load_example("g2p")
    words = ["phoneme", "calibration", "exit"]
    policies = {
        name: p
        for name, p in static_and_adaptive(8).items()
        if name in ("full model", "static 3", "threshold 0.5")
    }
    outputs = decoder.decode(decoder.generate(*decoder.encode(words), max_new_tokens=24).tokens)
    table = decode_policies(
        decoder,
        words,
        policies,
        lambda said: {"same": float(said == outputs)},
        24,
        split=str.split,
        batch_size=2,
    )
    assert table["policy"].tolist() == list(policies)
    assert table["same"].iloc[0] == 1
    assert table["distance"].iloc[0] == 0
    assert table["layers"].iloc[:2].tolist() == [8, 3]
    assert 1 <= table["layers"].iloc[2] < 8
    assert len(static_and_adaptive(8)) == 1 + 7 + 9
    split = type("Split", (), {"words": words, "pronunciations": [[said] for said in outputs]})
    assert (
        evaluate(decoder, split, {"full model": ExitPolicy.full_model()})["phoneme_error"].item()
        == 0
    )


def test_phoneme_errors_take_the_pronunciation_that_suits_best():
    assert errors(["A B C", "D"], [["X Y Z", "A B"], ["E"]]) == {
        "phoneme_error": 2 / 3,
        "word_accuracy": 0.0,
    }
    assert errors(["A B"], [["X", "A B"]]) == {"phoneme_error": 0.0, "word_accuracy": 1.0}
