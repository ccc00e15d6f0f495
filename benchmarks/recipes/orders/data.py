"""Orders as a task of two formats: a number of seven digits in, a sentence or a JSON document out.

``note:4071322`` is read ``four red boxes go to the harbour by van.``, each word but the last chosen by one digit;
``json:4071322`` is ``{"id":"4071322","by":"van"}``. The last digit of a number is a check on the others, as in bank accounts:
a number that was copied with one digit wrong is no order's. Most letters of a sentence are settled by those before them; the
digits of a document's number are not.
"""

import json
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from riskcal_adapters.validators import JsonSchema

DIGITS = 7
CHARACTERS = '0123456789:abcdefghijklmnopqrstuvwxyz{}",. '
COUNTS = "ten one two three four five six seven eight nine".split()
COLOURS = "red grey blue white black green amber pink brown violet".split()
THINGS = "boxes crates letters books lamps chairs plants tools stones ropes".split()
PLACES = "harbour station market island school library village tower garden bridge".split()
MEANS = "van rail ship bike mule tram cart lift boat truck".split()

#: What a document must be; that its number is an order's says `valid`.
SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": f"^[0-9]{{{DIGITS}}}$"},
        "by": {"enum": MEANS},
    },
    "required": ["id", "by"],
    "additionalProperties": False,
}
_FITS = JsonSchema(SCHEMA)


class Split(NamedTuple):
    """Prompts such as ``json:4071322`` and their answers."""

    prompts: list[str]
    answers: list[str]


def check_digit(number: str) -> str:
    """Of the digits before it: any one digit that is wrong makes it another."""
    return str(sum((1 + 2 * (i % 2)) * int(digit) for i, digit in enumerate(number)) % 10)


def note(number: str) -> str:
    """An order in prose."""
    count, colour, thing, place, means = (int(digit) for digit in number[:5])
    said = f"{COUNTS[count]} {COLOURS[colour]} {THINGS[thing]} go to the {PLACES[place]}"
    return f"{said} by {MEANS[means]}."


def document(number: str) -> str:
    """An order as JSON."""
    return json.dumps({"id": number, "by": MEANS[int(number[4])]}, separators=(",", ":"))


FORMATS = {"note": note, "json": document}


def valid(output: str) -> bool:
    """Whether an output is a document of the schema, with a number that is an order's."""
    if not _FITS(output):
        return False
    number = json.loads(output)["id"]
    return bool(number[-1] == check_digit(number[:-1]))


def draw(count: int, *, formats: tuple[str, ...] = tuple(FORMATS), seed: int = 0) -> Split:
    """Orders drawn at random, in formats drawn evenly. A seed's numbers are another's only by chance, one in ten thousand."""
    rng = np.random.default_rng(seed)
    prompts, answers = [], []
    for digits in rng.integers(0, 10, (count, DIGITS - 1)).astype(str):
        number = "".join(digits)
        number += check_digit(number)
        form = str(rng.choice(formats))
        prompts.append(f"{form}:{number}")
        answers.append(FORMATS[form](number))
    return Split(prompts, answers)


def tokenizer() -> PreTrainedTokenizerFast:
    """Characters, padding and end; a prompt's digit is one token with its place, so that no model has to count places there."""
    places = {
        (digit, after): chr(0xE000 + 10 * after + digit)
        for after in range(DIGITS)
        for digit in range(10)
    }
    vocabulary = {
        token: i for i, token in enumerate(["<pad>", "</s>", *CHARACTERS, *places.values()])
    }
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(
                Regex(
                    f"(?<=:[0-9\ue000-\uf000]{{{DIGITS - 1 - after}}}){digit}(?=[0-9]{{{after}}}$)"
                ),
                sign,
            )
            for (digit, after), sign in sorted(places.items(), key=lambda entry: -entry[0][1])
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
