"""Numbers in words: names against a parser and by hand, parts of the data, and the tokenizer."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.numbers import data
from recipes.numbers.train import MAX_NEW_TOKENS, errors
from riskcal import ExitPolicy
from riskcal_adapters.torch import load_example

WORTH = {word: value for value, word in enumerate(data._EN_UNITS)} | {
    word: 10 * (value + 2) for value, word in enumerate(data._EN_TENS)
}
BY_HAND = {
    0: ("zero", "zéro", "null"),
    1: ("one", "un", "eins"),
    16: ("sixteen", "seize", "sechzehn"),
    21: ("twenty-one", "vingt et un", "einundzwanzig"),
    70: ("seventy", "soixante-dix", "siebzig"),
    71: ("seventy-one", "soixante et onze", "einundsiebzig"),
    80: ("eighty", "quatre-vingts", "achtzig"),
    81: ("eighty-one", "quatre-vingt-un", "einundachtzig"),
    99: ("ninety-nine", "quatre-vingt-dix-neuf", "neunundneunzig"),
    101: ("one hundred one", "cent un", "einhunderteins"),
    200: ("two hundred", "deux cents", "zweihundert"),
    1001: ("one thousand one", "mille un", "eintausendeins"),
    1980: (
        "one thousand nine hundred eighty",
        "mille neuf cent quatre-vingts",
        "eintausendneunhundertachtzig",
    ),
    80_000: ("eighty thousand", "quatre-vingt mille", "achtzigtausend"),
    200_000: ("two hundred thousand", "deux cent mille", "zweihunderttausend"),
    1_000_000: ("one million", "un million", "eine million"),
    80_000_000: ("eighty million", "quatre-vingts millions", "achtzig millionen"),
    2_000_300: (
        "two million three hundred",
        "deux millions trois cents",
        "zwei millionen dreihundert",
    ),
}
NUMBERS = st.integers(0, 10**9 - 1) | st.integers(0, 2000)


@pytest.mark.parametrize("number", BY_HAND)
def test_names_by_hand(number):
    assert tuple(name(number) for name in data.LANGUAGES.values()) == BY_HAND[number]


@given(NUMBERS)
def test_english_names_are_worth_their_number(number):
    total = group = 0
    for word in data.english(number).replace("-", " ").split():
        if word in ("million", "thousand"):
            total, group = total + group * (10**6 if word == "million" else 1000), 0
        else:
            group = group * 100 if word == "hundred" else group + WORTH[word]
    assert total + group == number


@given(NUMBERS, NUMBERS, st.sampled_from(sorted(data.LANGUAGES)))
def test_different_numbers_have_different_names(one, other, language):
    name = data.LANGUAGES[language]
    assert (name(one) == name(other)) == (one == other)
    assert set(name(one)) <= set(data.CHARACTERS)


def test_parts_share_no_number_whatever_the_language():
    drawn = {part: data.draw(part, 300) for part in ("train", "development", "test")}
    numbers = {
        part: {prompt.partition(":")[2] for prompt in split.prompts}
        for part, split in drawn.items()
    }
    assert not numbers["train"] & (numbers["development"] | numbers["test"])
    assert not numbers["development"] & numbers["test"]
    for split in drawn.values():
        assert len(set(split.prompts)) == 300
        assert all(
            data.LANGUAGES[p[:2]](int(p[3:])) == name for p, name in zip(*split, strict=True)
        )
    assert data.draw("test", 300) == drawn["test"]
    assert data.draw("test", 300, seed=1) != drawn["test"]


def test_names_come_back_from_their_tokens():
    tokenizer = data.tokenizer()
    names = data.draw("development", 50).names
    ids = tokenizer(names)["input_ids"]
    assert all(row[-1] == tokenizer.eos_token_id and 0 not in row for row in ids)
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == names


@given(st.integers(100, 10**7 - 1), st.integers(100, 10**7 - 1))
def test_a_digit_is_one_token_that_says_its_place(one, other):
    tokenizer = data.tokenizer()
    mine, others = (tokenizer([f"de:{number}"])["input_ids"][0][3:-1] for number in (one, other))
    assert len(mine) == len(str(one))
    for a, x in zip(reversed(mine), reversed(str(one)), strict=True):
        assert a != 0
        assert (a == tokenizer.convert_tokens_to_ids("0")) == (x == "0")
    for a, b, x, y in zip(mine[::-1], others[::-1], str(one)[::-1], str(other)[::-1], strict=False):
        assert (a == b) == (x == y)  # in the same place
    nonzero = [token for token, x in zip(mine, str(one), strict=True) if x != "0"]
    assert len(set(nonzero)) == len(nonzero)  # in different places


def test_errors_count_edits_over_all_characters():
    assert errors(["abc", "xy"], ["abd", "xy"]) == {"character_error": 1 / 5, "exact": 0.5}


def test_the_shipped_model_names_held_out_numbers_early_and_well():
    decoder = load_example("numbers")
    split = data.draw("test", 40)
    encoded = decoder.encode(split.prompts)
    found = {}
    for threshold in (math.inf, 0.9):
        generation = decoder.generate(
            *encoded, policy=ExitPolicy(threshold=threshold), max_new_tokens=MAX_NEW_TOKENS
        )
        found[threshold] = errors(decoder.decode(generation.tokens), split.names)["character_error"]
        layers = generation.exit_layers[generation.exit_layers > 0].float().mean().item()
    # development: under 0.01 at both, and 2.3 of 8 layers at 0.9
    assert max(found.values()) < 0.03
    assert layers < 3
