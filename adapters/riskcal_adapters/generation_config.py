"""What a model's generation config says: the ids that frame an output, its length, and that it asks for greedy decoding."""

from collections.abc import Container, Iterable, Sized
from typing import Any, NamedTuple

from riskcal import RiskcalError, internal

DEFAULT_LENGTH = 64

#: Settings of a generation config under which a model's own ``generate`` is not plain greedy decoding, unless they have one
#: of these values.
_GREEDY: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "do_sample": (None, False),
    "num_return_sequences": (None, 1),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0.0),
    "token_healing": (None, False),
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "guidance_scale": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    **dict.fromkeys(
        (
            "bad_words_ids",
            "begin_suppress_tokens",
            "constraints",
            "dola_layers",
            "exponential_decay_length_penalty",
            "force_words_ids",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "max_time",
            "penalty_alpha",
            "sequence_bias",
            "stop_strings",
            "suppress_tokens",
            "watermarking_config",
        ),
        (None,),
    ),
}


#: All that is read of a generation config.
GENERATION = (
    "pad_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "max_new_tokens",
    "max_length",
    *_GREEDY,
)


class SpecialTokens(NamedTuple):
    """The ids that frame a generation."""

    pad: int
    ends: tuple[int, ...]
    start: int


def greedy_only(config: Any, *, but: Container[str] = ()) -> None:
    """Refuse a generation config that asks for anything but greedy decoding: it would silently be ignored.

    Settings named in ``but`` are not looked at.
    """
    for name, neutral in _GREEDY.items():
        if name in but:
            continue
        value = getattr(config, name, None)
        if isinstance(value, Sized) and not len(value):
            continue  # no tokens to suppress, no strings to stop at
        if value not in neutral:
            why = "does not look at the clock" if name == "max_time" else "is greedy"
            raise RiskcalError(
                f"generation_config.{name}: {value!r}, but early-exit decoding {why}; "
                f"set model.generation_config.{name} = {neutral[-1]!r}."
            )


def special_tokens(config: Any, vocabulary: int) -> SpecialTokens:
    """Padding, end and start ids of a generation config: none of them missing, and all in the vocabulary."""
    found: dict[str, list[int]] = {}
    for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        value = getattr(config, name, None)
        if value is None or (isinstance(value, Sized) and not len(value)):
            raise RiskcalError(
                f"generation_config.{name}: is missing; set model.generation_config.{name} (T5: pad 0, eos 1, start 0)."
            )
        found[name] = list(
            dict.fromkeys(int(one) for one in (value if isinstance(value, Iterable) else [value]))
        )
        foreign = [one for one in found[name] if not 0 <= one < vocabulary]
        if foreign:
            raise RiskcalError(
                f"generation_config.{name}: {foreign[0]} is not in the model's vocabulary of {vocabulary}."
            )
        if len(found[name]) > 1 and name != "eos_token_id":
            raise RiskcalError(
                f"generation_config.{name}: {found[name]}, but all rows of this decoder have one; set "
                f"model.generation_config.{name} to one id, and make a decoder for each."
            )
    return SpecialTokens(
        found["pad_token_id"][0], tuple(found["eos_token_id"]), found["decoder_start_token_id"][0]
    )


def of_causal(config: Any, vocabulary: int) -> SpecialTokens:
    """Padding and end ids of a causal language model's generation config, which may lack either; there is no start id.

    Without a padding id rows are padded with their end. Without an end they all run to the limit, and none is padded.
    """
    held = {name: getattr(config, name, None) for name in ("eos_token_id", "pad_token_id")}
    ends, pads = (
        [int(one) for one in (value if isinstance(value, Iterable) else [value]) if one is not None]
        for value in held.values()
    )
    for name, ids in (("eos_token_id", ends), ("pad_token_id", pads)):
        foreign = [one for one in ids if not 0 <= one < vocabulary]
        if foreign:
            raise RiskcalError(
                f"generation_config.{name}: {foreign[0]} is not in the model's vocabulary of {vocabulary}."
            )
    return SpecialTokens([*pads, *ends, -1][0], tuple(dict.fromkeys(ends)), -1)


def default_length(config: Any) -> int:
    """Tokens at most where neither caller nor policy says.

    A generation config's ``max_new_tokens``, else its ``max_length`` less the start token, which that counts, else 64.
    """
    new, whole = getattr(config, "max_new_tokens", None), getattr(config, "max_length", None)
    if new is not None:
        return internal.count(new, "generation_config.max_new_tokens", least=1)
    if whole is not None:
        return internal.count(whole, "generation_config.max_length", least=2) - 1
    return DEFAULT_LENGTH
