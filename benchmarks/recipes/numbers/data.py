"""Numbers in words as a task with long outputs: digits in, the letters of an English, French or German number name out.

``fr:1980`` is read ``mille neuf cent quatre-vingts``. The names are made here, by the languages' own rules, so there are as
many examples as wanted. Tokens are letters: most are settled by the word they stand in, a few by a digit of the prompt.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

DIGITS = (3, 7)
CHARACTERS = "0:abcdefghijklmnopqrstuvwxyzßäöüéè- "

_EN_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen".split()
)
_EN_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_FR_UNITS = (
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept dix-huit "
    "dix-neuf".split()
)
_FR_TENS = "vingt trente quarante cinquante soixante".split()
_DE_UNITS = (
    "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn".split()
)
_DE_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()


class Split(NamedTuple):
    """Prompts such as ``en:1980`` and their names."""

    prompts: list[str]
    names: list[str]


def english(number: int) -> str:
    """The name of 0 <= number < 10**9, without "and"."""
    parts = []
    for size, scale in ((10**6, " million"), (1000, " thousand"), (1, "")):
        group, number = divmod(number, size)
        if group:
            hundreds, rest = divmod(group, 100)
            below = [_EN_UNITS[hundreds] + " hundred"] if hundreds else []
            if rest >= 20:
                tens, unit = divmod(rest, 10)
                below.append(_EN_TENS[tens - 2] + (f"-{_EN_UNITS[unit]}" if unit else ""))
            elif rest:
                below.append(_EN_UNITS[rest])
            parts.append(" ".join(below) + scale)
    return " ".join(parts) or _EN_UNITS[0]


def french(number: int) -> str:
    """The name of 0 <= number < 10**9, in the spelling before 1990: hyphens only between tens and units."""
    millions, rest = divmod(number, 10**6)
    thousands, units = divmod(rest, 1000)
    parts = []
    if millions:
        parts.append(f"{_french_group(millions, last=True)} million{'s' if millions > 1 else ''}")
    if thousands:
        parts.append("mille" if thousands == 1 else f"{_french_group(thousands, last=False)} mille")
    if units:
        parts.append(_french_group(units, last=True))
    return " ".join(parts) or _FR_UNITS[0]


def _french_group(group: int, *, last: bool) -> str:
    """The name of 1 to 999; "cents" and "quatre-vingts" have their s at the end of a number and before "millions"."""
    hundreds, rest = divmod(group, 100)
    parts = []
    if hundreds:
        plural = "s" if hundreds > 1 and not rest and last else ""
        parts.append(f"{_FR_UNITS[hundreds]} cent{plural}" if hundreds > 1 else "cent")
    if rest >= 80:
        unit = rest - 80
        parts.append("quatre-vingt" + (f"-{_FR_UNITS[unit]}" if unit else "s" if last else ""))
    elif rest >= 20:
        tens, unit = divmod(rest, 10)
        if tens == 7:
            tens, unit = 6, unit + 10
        joint = " et " if unit in (1, 11) else "-"
        parts.append(_FR_TENS[tens - 2] + (f"{joint}{_FR_UNITS[unit]}" if unit else ""))
    elif rest:
        parts.append(_FR_UNITS[rest])
    return " ".join(parts)


def german(number: int) -> str:
    """The name of 0 <= number < 10**9, in small letters."""
    millions, rest = divmod(number, 10**6)
    thousands, units = divmod(rest, 1000)
    parts = []
    if millions:
        parts.append("eine million" if millions == 1 else f"{_german_group(millions)} millionen")
    if rest:
        parts.append(
            (f"{_german_group(thousands)}tausend" if thousands else "")
            + _german_group(units, alone=True)
        )
    return " ".join(parts) or _DE_UNITS[0]


def _german_group(group: int, *, alone: bool = False) -> str:
    """The name of 0 to 999, empty for 0; a final one is "eins" where nothing follows (``alone``)."""
    hundreds, rest = divmod(group, 100)
    name = f"{_DE_UNITS[hundreds]}hundert" if hundreds else ""
    if rest >= 20:
        tens, unit = divmod(rest, 10)
        return name + (f"{_DE_UNITS[unit]}und" if unit else "") + _DE_TENS[tens - 2]
    if rest:
        return name + _DE_UNITS[rest] + ("s" if rest == 1 and alone else "")
    return name


LANGUAGES = {"en": english, "fr": french, "de": german}


def draw(part: str, count: int, *, seed: int = 0) -> Split:
    """Numbers of 3 to 7 digits, all lengths alike, in languages drawn evenly, without repetition.

    Parameters
    ----------
    part : {"train", "development", "test"}
        A number belongs to one of them, whatever the language: by its hash, about 8, 1 and 1 in ten.
    count
        Of different prompts.
    seed
        Of the draw.
    """
    rng = np.random.default_rng([seed, len(part)])
    names: dict[str, str] = {}
    while len(names) < count:
        length = rng.integers(DIGITS[0], DIGITS[1] + 1)
        number = int(rng.integers(10 ** (length - 1), 10**length))
        if part_of(number) == part:
            language = str(rng.choice(list(LANGUAGES)))
            names[f"{language}:{number}"] = LANGUAGES[language](number)
    return Split(list(names), list(names.values()))


def part_of(number: int) -> str:
    """The part of the data that a number is in."""
    place = hashlib.blake2b(str(number).encode(), digest_size=4).digest()[0] % 10
    return "test" if place == 0 else "development" if place == 1 else "train"


def tokenizer() -> PreTrainedTokenizerFast:
    """Letters, padding and end; a prompt's digit is one token with its place, so that no model has to count places.

    ``fr:1980`` is ``f r : 1000 900 80 0``; ``0`` stands in ones' place as well as in others. 101 tokens in all. Names are read
    back without loss.
    """
    places = {
        (digit, zeros): f"{digit}{'0' * zeros}"
        for zeros in range(DIGITS[1])
        for digit in range(1, 10)
    }
    # one private character for each, until it is a token
    signs = {key: chr(0xE000 + i) for i, key in enumerate(places)}
    vocabulary = {
        token: i for i, token in enumerate(["<pad>", "</s>", *CHARACTERS, *signs.values()])
    }
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(f"{digit}(?=[0-9]{{{zeros}}}$)"), sign)
            for (digit, zeros), sign in sorted(signs.items(), key=lambda entry: -entry[0][1])
        ]
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
