"""Hugging Face's trainer with the losses of this package, and the one way in which recipes use it."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import (
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from riskcal import internal
from riskcal_adapters import _extras, generation_config
from riskcal_adapters.torch import replacing
from riskcal_adapters.torch.training import folders
from riskcal_adapters.torch.training.batches import (
    Batch,
    Batches,
    Pair,
    Pairs,
    check_pairs,
    collator,
)
from riskcal_adapters.torch.training.classifier import ExitClassifier
from riskcal_adapters.torch.training.confidence import Confidence, softmax_margin
from riskcal_adapters.torch.training.forward import THRESHOLDS as THRESHOLDS
from riskcal_adapters.torch.training.forward import decoder_pass, dropout_rates
from riskcal_adapters.torch.training.losses import (
    consistency_labels,
    geometric_loss,
    independent_loss,
    layer_weighted_loss,
)
from riskcal_adapters.torch.training.saved import (
    load_weights,
    steps_of,
    weights_of,
    weights_of_file,
)
from riskcal_adapters.torch.training.saved import write_checkpoint as write_checkpoint


@dataclass(frozen=True)
class Stage:
    """One stage of training: an objective and how long to follow it.

    Attributes
    ----------
    steps, batch_size, learning_rate
        AdamW with a warm-up of at most 200 steps, then a cosine down to 2%.
    thresholds
        One is drawn for each batch. Only ``inf``: plain training. See `decoder_pass`.
    confidence
        What the thresholds are compared with.
    weights : {"linear", "uniform", "geometric"}
        Of the layers' losses.
    largest_dropout
        Rate at which the last layer is dropped; lower layers less (see `dropout_rates`).
    seed
        Order of the data, thresholds and dropped layers.

    Examples
    --------
    >>> from riskcal_adapters.torch.training.trainer import Stage
    >>> stage = Stage(steps=2000, learning_rate=1e-3, thresholds=(0.5, 0.9, float("inf")), largest_dropout=0.1)
    >>> stage.batch_size, stage.weights
    (128, 'linear')
    """

    steps: int
    learning_rate: float
    batch_size: int = 128
    thresholds: tuple[float, ...] = (math.inf,)
    confidence: Confidence = softmax_margin
    weights: str = "linear"
    largest_dropout: float = 0.0
    seed: int = 0


def new_t5(
    vocabulary: int, *, decoder_layers: int = 8, seed: int = 0
) -> T5ForConditionalGeneration:
    """A T5 v1.1 of width 128 with 2 encoder layers and a head of its own; 2.2 million weights with 8 decoder layers.

    Examples
    --------
    >>> from riskcal_adapters.torch.training.trainer import new_t5
    >>> model = new_t5(vocabulary=41)
    >>> round(model.num_parameters() / 1e6, 1), model.config.num_decoder_layers
    (2.2, 8)
    """
    torch.manual_seed(seed)
    config = T5Config(  # type: ignore[call-arg]  # it takes more than it declares
        vocab_size=vocabulary,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=decoder_layers,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    # transformers 5 ties the head to the embedding whatever the config says
    model.lm_head.weight = torch.nn.Parameter(
        torch.randn(vocabulary, config.d_model) * config.d_model**-0.5
    )
    return model


class PairTrainer(Trainer):
    """Hugging Face's trainer on pairs, in `Batches`.

    Parameters
    ----------
    model, arguments, callbacks
        As Hugging Face's trainer takes them: what learns, and how.
    pairs
        What is learnt from.
    collated
        Makes a batch of some of them, as `collator` gives it.
    loss
        Of a batch at a step, counted from 0. Default: the model's own.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        arguments: TrainingArguments,
        pairs: Pairs,
        collated: Callable[[Pairs], Batch],
        loss: Callable[[Batch, int], Tensor] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        # a list is all that torch needs of a data set: places and a length
        self.pairs = cast("Dataset[Pair]", pairs)
        super().__init__(model, arguments, train_dataset=self.pairs, callbacks=callbacks)
        self.collated, self.loss = collated, loss
        self.lengths = np.array([len(target) for _, target in pairs])

    def get_train_dataloader(self) -> DataLoader[Pair]:
        size, seed = self.args.per_device_train_batch_size, self.args.seed
        sampler = Batches(self.lengths, size, seed)
        return DataLoader(self.pairs, batch_sampler=sampler, collate_fn=self.collated)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        if self.loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self.loss(cast(Batch, inputs), self.state.global_step)


def exit_loss(model: T5ForConditionalGeneration, stage: Stage, batch: Batch, step: int) -> Tensor:
    """The layer-weighted loss over a pass whose threshold and dropped layers are drawn for this step."""
    rng = np.random.default_rng([stage.seed, step])
    threshold = float(rng.choice(stage.thresholds))
    dropped, labels = None, batch["labels"]
    if stage.largest_dropout:
        rates = dropout_rates(len(model.decoder.block), stage.largest_dropout).numpy()
        drawn = rng.random((len(rates), len(labels))) < rates[:, None]
        dropped = torch.from_numpy(drawn).to(labels.device)
    given = batch["input_ids"], batch["attention_mask"], batch["decoder_input_ids"]
    _, logits = decoder_pass(model, *given, threshold, confidence=stage.confidence, dropped=dropped)
    return layer_weighted_loss(logits, labels, stage.weights)


def train(
    model: T5ForConditionalGeneration,
    pairs: Pairs,
    folder: Path,
    stage: Stage,
    *,
    save_steps: int = 500,
    callbacks: list[TrainerCallback] | None = None,
) -> None:
    """Train the model in place. Its steps are saved in ``folder``; a run that was cut off goes on from there.

    Parameters
    ----------
    model
        As from `new_t5` or `riskcal_adapters.torch.load_t5`.
    pairs
        Token ids of prompts and of targets, both with their end token. The decoder's input begins with the model's own
        ``decoder_start_token_id``.
    folder
        For Hugging Face's own checkpoints. One folder holds one stage: where it is finished, the model gets its weights and
        no step is made.
    stage
        Objective and length.
    save_steps, callbacks
        As Hugging Face's trainer has them.

    Raises
    ------
    RiskcalError
        If the folder was begun with another stage, other pairs or a model of another shape or start token, or cannot be
        written; if there are no pairs, or a token is not in the model's vocabulary.

    Warns
    -----
    UserWarning
        If the folder's run began with other weights than the model's: these are then replaced.

    Examples
    --------
    >>> from pathlib import Path
    >>> from riskcal_adapters.torch.training.trainer import Stage, new_t5, train
    >>> pairs = [([5, 6, 1], [7, 8, 1]), ([9, 1], [3, 1])]  # ids of prompts and targets, 1 being the end
    >>> model = new_t5(vocabulary=41, decoder_layers=2)
    >>> train(model, pairs, Path("run"), Stage(steps=2, learning_rate=1e-3, batch_size=2))
    {'train_runtime': ...}
    >>> sorted(path.name for path in Path("run").glob("checkpoint-*"))
    ['checkpoint-2']
    """
    folder = internal.a_path(folder)
    check_pairs(pairs, model.config.vocab_size)
    shapes = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    special = generation_config.special_tokens(model.generation_config, model.config.vocab_size)
    settings = {
        "stage": dataclasses.asdict(stage),
        "pairs": folders.digest(
            [[list(map(int, source)), list(map(int, target))] for source, target in pairs]
        ),
        "model": folders.digest([shapes, special.start, special.pad]),
    }
    begun = folders.note_settings(folder, settings, beside={"begun_with": weights_of(model)})[
        "begun_with"
    ]
    last = folders.last_checkpoint(folder)
    if last is not None:
        weights = last / "model.safetensors"
        if begun != (given := weights_of(model)) and given != weights_of_file(weights, model):
            warnings.warn(
                f"{folder}: the run there began with other weights than the given model has, which are now replaced by its "
                f"own at {last.name}; to train this model, give another folder.",
                stacklevel=2,
            )
        if steps_of(last) >= stage.steps:
            load_weights(model, weights)
            return
    how = arguments(
        folder,
        stage.steps,
        stage.learning_rate,
        stage.batch_size,
        stage.seed,
        save_steps=min(save_steps, stage.steps),
    )
    trainer = PairTrainer(
        model,
        how,
        pairs,
        collator(model),
        functools.partial(exit_loss, model, stage),
        callbacks,
    )
    with replacing.written(folder):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))


def classifier_loss(
    classifier: ExitClassifier,
    backbone: T5ForConditionalGeneration,
    objective: str,
    batch: Batch,
    step: int,
) -> Tensor:
    """One of the classifier's losses on the states of a backbone that does not learn; the same at every step."""
    with torch.no_grad():
        given = batch["input_ids"], batch["attention_mask"], batch["decoder_input_ids"]
        states, logits = decoder_pass(backbone, *given)
        consistent = consistency_labels(logits)
    scores = classifier(states[:-1])
    if objective == "geometric":
        return geometric_loss(scores, consistent, batch["labels"])
    return independent_loss(scores, consistent, batch["labels"], balanced=objective == "balanced")


def train_classifier(
    backbone: T5ForConditionalGeneration,
    pairs: Pairs,
    folder: Path,
    objective: str = "independent",
    *,
    steps: int = 400,
    learning_rate: float = 1e-2,
    batch_size: int = 128,
    seed: int = 0,
) -> ExitClassifier:
    """An exit classifier for a model that is only read: the trainer's parameters are the classifier's alone.

    Parameters
    ----------
    backbone
        A T5 trained with exits.
    pairs, steps, learning_rate, batch_size, seed
        As in `train` and `Stage`.
    folder
        Of the trainer, which needs one: nothing is saved there or resumed from there.
    objective : {"independent", "balanced", "geometric"}
        `independent_loss`, the same with balanced classes, or `geometric_loss`.

    Examples
    --------
    >>> from pathlib import Path
    >>> from riskcal_adapters.torch.training.trainer import new_t5, train_classifier
    >>> pairs = [([5, 6, 1], [7, 8, 1]), ([9, 1], [3, 1])]
    >>> backbone = new_t5(vocabulary=41, decoder_layers=2)  # in earnest, one that was trained with exits
    >>> classifier = train_classifier(backbone, pairs, Path("run"), steps=2, batch_size=2)
    {'train_runtime': ...}
    >>> classifier.weight.shape, classifier.weight.any().item()
    (torch.Size([128]), True)
    """
    internal.choice(objective, "objective", ("independent", "balanced", "geometric"))
    check_pairs(pairs, backbone.config.vocab_size)
    classifier = ExitClassifier(backbone.config.d_model)
    folder = internal.a_path(folder)
    how = arguments(folder, steps, learning_rate, batch_size, seed, save_steps=steps + 1)
    loss = functools.partial(classifier_loss, classifier, backbone.eval(), objective)
    trainer = PairTrainer(classifier, how, pairs, collator(backbone), loss)
    with replacing.written(folder):
        trainer.train()
    return classifier


def arguments(
    folder: Path, steps: int, learning_rate: float, batch_size: int, seed: int, *, save_steps: int
) -> TrainingArguments:
    """How Hugging Face's trainer is to go about it: everything of a `Stage` that is not its loss."""
    _extras.need("accelerate", "training", "g2p")
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.02},
        warmup_steps=min(200, steps // 5),
        adam_beta1=0.9,
        adam_beta2=0.98,
        weight_decay=0.01,
        max_grad_norm=1.0,
        logging_steps=50,
        save_strategy="steps" if save_steps <= steps else "no",
        save_steps=save_steps,
        save_total_limit=1,
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        seed=seed,
    )
