"""Hugging Face's trainer with the losses of this package, and the one way in which recipes use it."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from riskcal import RiskcalError
from riskcal_adapters import fingerprint, generation_config
from riskcal_adapters.torch.training import folders
from riskcal_adapters.torch.training.classifier import ExitClassifier
from riskcal_adapters.torch.training.confidence import Confidence, softmax_margin
from riskcal_adapters.torch.training.forward import decoder_pass, dropout_rates
from riskcal_adapters.torch.training.losses import (
    consistency_labels,
    geometric_loss,
    independent_loss,
    layer_weighted_loss,
)

Pairs = list[tuple[list[int], list[int]]]

#: Drawn once per batch in exit-aware training; ``inf`` is a batch in which nothing exits.
THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, math.inf)


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
    """A T5 v1.1 of width 128 with 2 encoder layers and a head of its own; 2.2 million weights with 8 decoder layers."""
    torch.manual_seed(seed)
    config = T5Config(
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


class Batches(torch.utils.data.Sampler):
    """Batches of targets of like length, in an order drawn anew each epoch."""

    def __init__(self, lengths: np.ndarray, size: int, seed: int) -> None:
        self.lengths, self.size, self.rng = lengths, size, np.random.default_rng(seed)

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.size)

    def __iter__(self):
        jittered = np.argsort(self.lengths + self.rng.random(len(self.lengths)), kind="stable")
        chunks = [jittered[i : i + self.size].tolist() for i in range(0, len(jittered), self.size)]
        yield from (chunks[i] for i in self.rng.permutation(len(chunks)))


def collate(pairs: Pairs, *, start: int = 0, pad: int = 0) -> dict[str, Tensor]:
    """One batch, padded on the right; labels are -100 there.

    Parameters
    ----------
    pairs
        Token ids of prompts and of targets.
    start, pad
        The ids that open and pad the decoder's input: 0 and 0 are T5's own. `collator` takes those of a model.
    """
    padded = functools.partial(pad_sequence, batch_first=True)
    sources = [torch.tensor(source) for source, _ in pairs]
    targets = [torch.tensor(target) for _, target in pairs]
    given = padded(targets, padding_value=pad)
    return {
        "input_ids": padded(sources, padding_value=pad),
        "attention_mask": padded([torch.ones_like(source) for source in sources]),
        "decoder_input_ids": torch.nn.functional.pad(given[:, :-1], (1, 0), value=start),
        "labels": padded(targets, padding_value=-100),
    }


def collator(model: T5ForConditionalGeneration) -> Callable[[Pairs], dict[str, Tensor]]:
    """`collate` with the start and padding ids that decoding this model begins and pads with."""
    special = generation_config.special_tokens(model.generation_config, model.config.vocab_size)
    return functools.partial(collate, start=special.start, pad=special.pad)


class _LengthSorted(Trainer):
    def get_train_dataloader(self) -> DataLoader:
        lengths = np.array([len(target) for _, target in self.train_dataset])
        sampler = Batches(lengths, self.args.per_device_train_batch_size, self.args.seed)
        return DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)


class EarlyExitTrainer(_LengthSorted):
    """Hugging Face's trainer with the layer-weighted loss over a pass whose exits and dropped layers are drawn per batch."""

    def __init__(self, *args, stage: Stage, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.stage = stage

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        stage, labels = self.stage, inputs["labels"]
        rng = np.random.default_rng([stage.seed, self.state.global_step])
        threshold = float(rng.choice(stage.thresholds))
        dropped = None
        if stage.largest_dropout:
            rates = dropout_rates(model.config.num_decoder_layers, stage.largest_dropout).numpy()
            dropped = torch.from_numpy(rng.random((len(rates), len(labels))) < rates[:, None]).to(
                labels.device
            )
        passed = (
            inputs["input_ids"],
            inputs["attention_mask"],
            inputs["decoder_input_ids"],
            threshold,
        )
        _, logits = decoder_pass(model, *passed, confidence=stage.confidence, dropped=dropped)
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
    """
    folder = Path(folder)
    _check_pairs(pairs, model.config.vocab_size)
    shapes = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    special = generation_config.special_tokens(model.generation_config, model.config.vocab_size)
    settings = {
        "stage": dataclasses.asdict(stage),
        "pairs": folders.digest(
            [[list(map(int, source)), list(map(int, target))] for source, target in pairs]
        ),
        "model": folders.digest([shapes, special.start, special.pad]),
    }
    begun = folders.note_settings(folder, settings, beside={"begun_with": _weights(model)})[
        "begun_with"
    ]
    last = get_last_checkpoint(str(folder))
    if last is not None:
        saved = Path(last) / "model.safetensors"
        if begun != (given := _weights(model)) and given != _weights_of_file(saved, model):
            warnings.warn(
                f"{folder}: the run there began with other weights than the given model has, which are now replaced by its "
                f"own at {Path(last).name}; to train this model, give another folder.",
                stacklevel=2,
            )
        if _steps_of(Path(last)) >= stage.steps:
            _load_weights(model, saved)
            return
    arguments = _arguments(
        folder,
        stage.steps,
        stage.learning_rate,
        stage.batch_size,
        stage.seed,
        save_steps=min(save_steps, stage.steps),
    )
    trainer = EarlyExitTrainer(
        model,
        arguments,
        train_dataset=pairs,
        data_collator=collator(model),
        stage=stage,
        callbacks=callbacks,
    )
    with folders.written(folder):
        trainer.train(resume_from_checkpoint=last)


def _weights(model: T5ForConditionalGeneration) -> str:
    return fingerprint.of_weights(
        (name, weight.detach().float().cpu()) for name, weight in model.state_dict().items()
    )


def _weights_of_file(path: Path, model: T5ForConditionalGeneration) -> str:
    found = dict(model.state_dict()) | _read_weights(path)
    return fingerprint.of_weights((name, weight.float().cpu()) for name, weight in found.items())


def _load_weights(model: T5ForConditionalGeneration, path: Path) -> None:
    found = _read_weights(path)
    copies = {
        name
        for name, weight in model.state_dict(keep_vars=True).items()
        if weight is model.shared.weight
    }
    lacking = sorted(set(model.state_dict()) - copies - set(found))
    if lacking:
        raise RiskcalError(
            f"{path}: lacks {lacking[0]}; delete the folder {path.parent} and train again."
        )
    model.load_state_dict(found, strict=False)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RiskcalError(
            f"{path}: cannot be read ({error}); delete the folder {path.parent} and train again."
        ) from None


def _steps_of(checkpoint: Path) -> int:
    state = folders.read_settings(checkpoint / "trainer_state.json")
    return int(state["global_step"])


def _check_pairs(pairs: Pairs, vocabulary: int) -> None:
    if not len(pairs):
        raise RiskcalError(
            "pairs: there is none; give token ids of at least one prompt and its target."
        )
    for row, pair in enumerate(pairs):
        for what, ids in zip(("prompt", "target"), pair, strict=True):
            foreign = [one for one in ids if not 0 <= one < vocabulary]
            if foreign or not len(ids):
                said = (
                    f"holds {foreign[0]}, not in the model's vocabulary of {vocabulary}"
                    if foreign
                    else "is empty"
                )
                raise RiskcalError(
                    f"pairs: the {what} at row {row} {said}; give token ids with their end token."
                )


class _ClassifierTrainer(_LengthSorted):
    def __init__(
        self, *args, backbone: T5ForConditionalGeneration, objective: str, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        self.backbone, self.objective = backbone, objective

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            states, logits = decoder_pass(
                self.backbone,
                inputs["input_ids"],
                inputs["attention_mask"],
                inputs["decoder_input_ids"],
            )
            consistent = consistency_labels(logits)
        scores = model(states[:-1])
        if self.objective == "geometric":
            return geometric_loss(scores, consistent, inputs["labels"])
        return independent_loss(
            scores, consistent, inputs["labels"], balanced=self.objective == "balanced"
        )


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
    pairs, folder, steps, learning_rate, batch_size, seed
        As in `train` and `Stage`.
    objective : {"independent", "balanced", "geometric"}
        `independent_loss`, the same with balanced classes, or `geometric_loss`.
    """
    _check_pairs(pairs, backbone.config.vocab_size)
    classifier = ExitClassifier(backbone.config.d_model)
    arguments = _arguments(folder, steps, learning_rate, batch_size, seed, save_steps=steps + 1)
    trainer = _ClassifierTrainer(
        classifier,
        arguments,
        train_dataset=pairs,
        data_collator=collator(backbone),
        backbone=backbone.eval(),
        objective=objective,
    )
    with folders.written(Path(folder)):
        trainer.train()
    return classifier


def write_checkpoint(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Half-precision weights, each stored once, with the configs and tokenizer that read them back."""
    with folders.replaced(folder) as staging:
        tokenizer.save_pretrained(staging)
        model.config.use_cache = (
            True  # the trainer turns it off, and generate() with a given cache then goes wrong
        )
        model.config.save_pretrained(staging)
        model.generation_config.save_pretrained(staging)
        skip = {
            "encoder.embed_tokens.weight",
            "decoder.embed_tokens.weight",
        }  # the shared embedding again
        weights = {
            k: v.detach().half().contiguous()
            for k, v in model.state_dict().items()
            if k not in skip
        }
        save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})


def _arguments(
    folder: Path, steps: int, learning_rate: float, batch_size: int, seed: int, *, save_steps: int
) -> TrainingArguments:
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
