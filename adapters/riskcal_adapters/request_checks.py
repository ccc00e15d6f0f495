"""What may be asked of a decoder: the checks that all frameworks share, and what they make of policies for its loop.

On numpy arrays and plain objects.
"""

import warnings
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from riskcal import RiskcalError, internal
from riskcal.forbidden import Tokens
from riskcal.policy import DEFAULTS, ExitPolicy
from riskcal.policy.schedules import Decaying
from riskcal_adapters.fingerprint import BINDING, binding
from riskcal_adapters.generation_config import SpecialTokens

#: Measures that look at one exit at a time.
SIMPLE_MEASURES = ("softmax", "max", "entropy", "state", "classifier", "oracle")


def classifier_parts(
    classifier: Any, width: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights (d,) and bias () of an exit classifier of any framework, for states of this width."""
    lacking = [name for name in ("weight", "bias") if not hasattr(classifier, name)]
    if lacking:
        raise RiskcalError(
            f"classifier: a {type(classifier).__name__} without .{lacking[0]}; read a file with load_classifier(path) first."
        )
    held = (classifier.weight, classifier.bias)
    weight, bias = (
        np.asarray(values.detach().cpu().float() if hasattr(values, "detach") else values)
        for values in held
    )
    if weight.size != width or bias.size != 1:
        raise RiskcalError(
            f"classifier: has {weight.size} weights and {bias.size} biases; this model's states need {width} and 1."
        )
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise RiskcalError(
            "classifier: has weights that are not finite; train it again, or load another."
        )
    return weight.reshape(width).astype(np.float32), bias.reshape(()).astype(np.float32)


def prompt_mask(
    input_ids: NDArray[Any],
    attention_mask: NDArray[Any] | None,
    special: SpecialTokens,
    vocabulary: int,
) -> NDArray[np.bool_]:
    """Which prompt tokens are real (B, S), after checking both arrays; without a mask, all, as Hugging Face has it."""
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise RiskcalError(
            f"input_ids: has shape {input_ids.shape}; give (B, S), at least one prompt of at least one token each."
        )
    if input_ids.dtype.kind not in "iu":
        raise RiskcalError(
            f"input_ids: holds {input_ids.dtype}; give whole numbers, the tokens' ids."
        )
    if input_ids.min() < 0 or input_ids.max() >= vocabulary:
        bad = (input_ids < 0) | (input_ids >= vocabulary)
        raise RiskcalError(
            f"input_ids: {input_ids[bad][0]} at index {internal.first(bad)} is not in the model's vocabulary of {vocabulary}."
        )
    if attention_mask is not None:
        return _real_tokens(attention_mask, input_ids.shape)
    # where padding and end are one token, nothing can be told from it
    padding = input_ids == special.pad
    if padding.any() and special.pad not in special.ends:
        _refuse_rows(padding.all(axis=1), "input_ids: row {} holds only padding; drop the row.")
        warnings.warn(
            f"attention_mask: none is given, but row {internal.first(padding.any(axis=1))} of input_ids holds padding, "
            "which is now read as text; pass the mask that the tokenizer made.",
            stacklevel=4,
        )
    return np.ones(input_ids.shape, dtype=bool)


def _real_tokens(mask: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    if mask.shape != shape:
        raise RiskcalError(
            f"attention_mask: has shape {mask.shape}, but input_ids {shape}; give one entry per token."
        )
    real: NDArray[np.bool_] = mask == 1
    if not real.all():
        bad = ~real & (mask != 0)
        if bad.any():
            raise RiskcalError(
                f"attention_mask: {mask[bad][0]} at index {internal.first(bad)}; give 1 for real tokens and 0 for padding."
            )
        _refuse_rows(
            np.asarray(~real.any(axis=1)),
            "attention_mask: row {} is 0 throughout; drop the row, or unmask its tokens.",
        )
    return real


def _refuse_rows(rows: NDArray[np.bool_], complaint: str) -> None:
    if rows.any():
        raise RiskcalError(complaint.format(internal.first(rows)))


def policies(policy: Any, rows: int, measures: Sequence[str]) -> list[ExitPolicy]:
    """One policy, or one per row of the batch, each as `ExitPolicy.named` has it; ``measures`` are those of the decoder."""
    given = [policy] if isinstance(policy, ExitPolicy) else policy
    if not isinstance(given, Sequence) or not all(isinstance(one, ExitPolicy) for one in given):
        raise RiskcalError(f"policy: {policy!r} is neither an ExitPolicy nor a list of them.")
    if given is policy and len(given) != rows:
        raise RiskcalError(
            f"policy: {len(given)} policies for {rows} prompts; give one, or one per row."
        )
    named = [one.named() for one in given]
    for row, one in enumerate(named):
        where = "" if len(given) == 1 else f" of row {row}"
        if one.measure not in measures:
            needed = (
                " (it needs a decoder made with classifier=)" if one.measure == "classifier" else ""
            )
            raise RiskcalError(
                f"measure: {one.measure!r}{where} is not known to this decoder{needed}; choose one of "
                f"{', '.join(map(repr, measures))}."
            )
        if (
            one.measure == "entropy"
            and isinstance(one.schedule, Decaying)
            and not one.is_full_model
        ):
            raise RiskcalError(
                f"schedule: decays thresholds from 0 to 1, but the measure 'entropy'{where} is never above 0; give Constant(), "
                "or another measure."
            )
        if one.measure == "oracle" and one.sampling is not None:
            raise RiskcalError(
                f"sampling: the measure 'oracle'{where} knows the likeliest tokens, not drawn ones; leave it out."
            )
        if one.batching == "regroup" and (one.measure == "oracle" or one.emits == "last"):
            raise RiskcalError(
                f"batching: 'regroup'{where} skips layers, but measure 'oracle' and emits 'last' look at the last one; "
                "give 'diverge'."
            )
    return named


def defaults_only(asked: Sequence[ExitPolicy], fields: Sequence[str]) -> None:
    """Refuse policies that set any of these fields: for decoders that lack what they ask for."""
    for row, one in enumerate(asked):
        for name in fields:
            matters = name == "sampling" or not one.is_full_model
            if matters and getattr(one, name) != DEFAULTS.get(
                name, ExitPolicy.model_fields[name].default
            ):
                where = "" if len(asked) == 1 else f" of row {row}"
                raise RiskcalError(
                    f"{name}: {getattr(one, name)!r}{where} is not known to this decoder; leave it out."
                )


def fit_for_engine(policy: ExitPolicy, where: str, remedy: str) -> None:
    """Refuse, by the name of what it needs, a policy that rows of any depth and position cannot share slots under."""
    named = policy.model_copy(
        update={name: usual for name, usual in DEFAULTS.items() if getattr(policy, name) is None}
    )
    unable = {
        "measure": named.measure not in SIMPLE_MEASURES or named.measure == "oracle",
        "cache": named.cache != "project",
        "pruning": named.pruning is not None,
        "emits": named.emits != "exit",
        "batching": named.batching == "deepest",
    }
    for name, wrong in unable.items():
        if wrong:
            raise RiskcalError(
                f"{name}: {getattr(named, name)!r} of the {where} is not known to the engine; {remedy}."
            )


def texts_known(asked: Sequence[ExitPolicy], tokenizer: Any) -> None:
    """Refuse policies that forbid tokens by their texts, where a decoder has no tokenizer to tell them."""
    for row, one in enumerate(asked if tokenizer is None else ()):
        by_text = [rule for rule in one.forbidden if not isinstance(rule, Tokens)]
        if by_text and not one.is_full_model:
            where = "" if len(asked) == 1 else f" of row {row}"
            raise RiskcalError(
                f"forbidden: {by_text[0]!r}{where} is judged by texts, and this decoder has no tokenizer; make it with one, or "
                "name the tokens: Tokens(ids)."
            )


def at_heads(asked: Sequence[ExitPolicy], heads: Container[int], n_layers: int) -> None:
    """Refuse policies with a threshold for a layer without an exit head, where a decoder has these ``heads``."""
    for row, one in enumerate(asked):
        where = "" if len(asked) == 1 else f" of row {row}"
        for layer in one.thresholds or ():
            if layer not in heads and layer < n_layers:
                raise RiskcalError(
                    f"thresholds: layer {layer}{where} has no exit head in this decoder; give thresholds for layers "
                    "that have one, or make the decoder with a head for it."
                )


def settings(
    special: SpecialTokens,
    *,
    epsilon: float,
    activation: str,
    gated: bool,
    reach: int,
    scaled: bool,
    logits: str,
) -> dict[str, Any]:
    """What changes a T5's tokens beside its weights and the type of its layers, by the names of Hugging Face's configs.

    ``logits`` is the type of logits and attention weights, which decoders of one compute type may have in another.
    """
    return {
        "decoder_start_token_id": special.start,
        "eos_token_id": sorted(special.ends),
        "pad_token_id": special.pad,
        "layer_norm_epsilon": float(epsilon),
        "dense_act_fn": activation,
        "is_gated_act": gated,
        "relative_attention_max_distance": reach,
        "scale_decoder_outputs": scaled,
        "logits_dtype": logits,
    }


#: The type of policies that name weights and no type: their fingerprints were taken in it.
_UNNAMED_DTYPE = "float32"


def same_model(asked: Sequence[ExitPolicy], decoder: Any) -> None:
    """Refuse policies that were made for another model than the decoder's, naming what differs."""
    for row, one in enumerate(asked):
        where = "" if len(asked) == 1 else f" of row {row}"
        for name in BINDING:
            made_for = getattr(one, name)
            unnamed = name == "dtype" and made_for is None and one.weights is not None
            if unnamed:
                made_for = _UNNAMED_DTYPE
            if made_for is None or made_for == (has := binding(decoder, name)):
                continue
            if name == "tokenizer" and has is None:
                continue  # ids are then made elsewhere, and nothing can be told of them here
            if name == "config":
                _same_settings(made_for, has or {}, where)
            else:
                raise RiskcalError(
                    f"{name}: the policy{where} {_difference(name, made_for, has, unnamed=unnamed)}"
                )


def _difference(name: str, made_for: str, has: Any, *, unnamed: bool) -> str:
    if name == "dtype":
        old = " (it names weights and no type, as policies once did)" if unnamed else ""
        return (
            f"was made for a decoder that computes in {made_for}{old}, this one computes in {has}, where other tokens exit; "
            f"make the decoder in {made_for}, or calibrate anew on records of this one."
        )
    if name == "tokenizer":
        return (
            f"was made for prompts read by the tokenizer {made_for}, the decoder's is {has}; make the decoder with that "
            "tokenizer, or calibrate anew on records of this one."
        )
    whose = {"classifier_weights": "classifier", "head_weights": "decoder's exit heads"}.get(
        name, "model"
    )
    return f"was made for weights {made_for}, the {whose} has {has}; calibrate anew on records of this {whose}."


def _same_settings(made_for: Mapping[str, Any], has: Mapping[str, Any], where: str) -> None:
    for name, value in made_for.items():
        if name not in has or has[name] != value:
            own = repr(has[name]) if name in has else "none"
            raise RiskcalError(
                f"config: {name} is {value!r} in the model that the policy{where} was made for, and {own} in the decoder's; "
                "load the model with the same setting, or calibrate anew on records of this one."
            )


#: Fields in which the rows of one batch may differ.
_OF_A_ROW = {
    *("threshold", "thresholds", "learned", "schedule", "min_layer"),
    *("certificate", "max_new_tokens", "n_layers", *BINDING),
}


def rows_by_settings(
    asked: Sequence[ExitPolicy], thresholds: NDArray[np.float32]
) -> list[tuple[ExitPolicy, list[int]]]:
    """Rows that can be decoded together, with a policy that has their settings; ``thresholds`` are (T, L, B).

    Full-model policies are alike, whatever else they say, but for sampling. Pruning and contrasts depend on the layers that
    were looked at before, which rows must have in common: those that ``max_pending`` sends to the last layer, each at another
    time, are decoded alone. So are rows with the caches that are there to show what they lose, which know one depth only.
    """
    groups: dict[Any, tuple[ExitPolicy, list[int]]] = {}
    one_policy = [_in_common(one, thresholds[..., row]) for row, one in enumerate(asked)]
    for row in range(thresholds.shape[-1]):
        policy, key, alone = one_policy[row if len(asked) > 1 else 0]
        groups.setdefault((key, row if alone else None), (policy, []))[1].append(row)
    return list(groups.values())


def _in_common(policy: ExitPolicy, thresholds: NDArray[np.float32]) -> tuple[ExitPolicy, Any, bool]:
    """What a row's policy is, what it must have in common with others to be decoded with them, and whether it must be alone."""
    if policy.is_full_model:
        policy = ExitPolicy(sampling=policy.sampling).named()
    alike = policy.pruning is None and policy.measure in SIMPLE_MEASURES
    looked_at = None if alike else np.isfinite(thresholds).any(0).tobytes()
    differ = policy.cache in ("copy", "first") or (policy.max_pending is not None and not alike)
    key = policy.model_dump_json(exclude=_OF_A_ROW), looked_at
    return policy, key, differ and policy.batching != "deepest"


def length(max_new_tokens: int | None, asked: Sequence[ExitPolicy], default: int) -> int:
    """The length limit: the caller's, else the policies', else the default. One that a policy was not made for is refused."""
    calibrated = [one.max_new_tokens for one in asked if one.max_new_tokens is not None]
    if max_new_tokens is None:
        limit = calibrated[0] if calibrated else default
    else:
        limit = internal.count(max_new_tokens, "max_new_tokens", least=1)
    other = [value for value in calibrated if value != limit]
    if other:
        raise RiskcalError(
            f"max_new_tokens: {limit}, but a policy was calibrated for {other[0]}; generate with the limit it was calibrated for."
        )
    return limit


def exit_thresholds(
    asked: Sequence[ExitPolicy], rows: int, n_layers: int, limit: int, *, own_last: bool = False
) -> NDArray[np.float32]:
    """(T, L, B): the confidence that each row needs to exit, at each position and layer; (T, L + 1, B) with ``own_last``."""
    tables = [one.exit_thresholds(n_layers, limit, own_last=own_last) for one in asked]
    return np.stack(tables * (rows // len(tables)), axis=-1)


def prompt_ids(prompts: ArrayLike | None, rows: int) -> NDArray[Any]:
    """Ids of the prompts (B,), by default 0 to B - 1."""
    ids = np.arange(rows) if prompts is None else np.asarray(prompts)
    if ids.shape != (rows,):
        raise RiskcalError(
            f"prompts: has shape {ids.shape}; give one id for each of the {rows} prompts."
        )
    return ids
